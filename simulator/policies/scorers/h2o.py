"""H2O: the attention that every entry has gathered so far, half of the budget left to the newest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.attention import attention_blocks
from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Range, Ranges
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class H2O(Scorer):
    """Keep the heavy hitters: entries with the largest accumulated attention.

    Attributes
    ----------
    recent_share : float
        Share of a head's budget, rounded down, that the newest entries get before any heavy hitter. They are
        preferred, not protected: how many there are depends on the budget.

    Notes
    -----
    Every query pays a causal softmax over the entries its KV head still holds, mean over the GQA group, and
    an entry adds up what all queries since its own paid to it. So the first tokens gather from more queries
    than the last ones, as in the paper. What is evicted forgets its sum.

    Queries are looked at when the layer compresses; between two compressions nothing is evicted, so this is
    the sum that a step-by-step account would give. The paper evicts one entry per decode step, which
    ``buffer=1`` does, and keeps one set per query head. Published ports (KVCache-Factory) compress the prompt
    only, and protect a window of 8.

    The budget is the one in force before the heads are divided anew: a head that then falls below
    ``recent_share`` of it keeps recent entries only. Sums of different heads are not on one scale, which
    matters to head allocators that let entries of all heads compete.

    References
    ----------
    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048), section 4, algorithm 1.
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    stateful: ClassVar[bool] = True
    searched: ClassVar[Ranges] = {"recent_share": Range(0.05, 0.95)}
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        refuse_unless(0 <= self.recent_share <= 1, "recent_share", self.recent_share, "0 to 1")

    @property
    def sees_span(self) -> bool:
        """Every query counts once."""
        return True

    def observe(self, view: CacheView) -> np.ndarray:
        """Add what the queries since the last compression paid to each entry."""
        paid = np.zeros(view.n_entries)  # in double precision: a prompt adds up thousands of small weights
        for weights in attention_blocks(view):
            paid += weights.mean(axis=0).sum(axis=0, dtype=np.float64)
        return (noted(view) + paid).astype(np.float32)

    def score(self, view: CacheView) -> np.ndarray:
        """Score by accumulated attention, the newest entries above all others."""
        return self.prefer_recent(view, noted(view))

    def prefer_recent(self, view: CacheView, scores: np.ndarray) -> np.ndarray:
        """Lift the newest ``recent_share`` of the budget above all other scores; float32 (n_entries,)."""
        n_recent = int(self.recent_share * view.budget)
        newest = np.argsort(-view.positions, kind="stable")[:n_recent]
        return preferred(scores, newest)


def noted(view: CacheView) -> np.ndarray:
    """Give the attention noted of each entry, zero before anything was; float32 (n_entries,)."""
    return np.zeros(view.n_entries, np.float32) if view.state is None else view.state


def preferred(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Put the ``chosen`` slots above all other scores, equal among themselves; float32 (n_entries,)."""
    lifted = np.array(scores, np.float32)
    if len(lifted):
        top = lifted.max()
        # Where float32 is too coarse for one more, the next larger number does.
        lifted[chosen] = max(top + np.float32(1), np.nextafter(top, np.float32(np.inf)))
    return lifted
