"""Attention added up over all queries, and scores that put chosen entries first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.attention import attention_blocks
from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, between, parameter
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """Base of scorers that add up the attention every entry has gathered.

    Attributes
    ----------
    recent_share : float
        Share of a head's budget, rounded down, that the newest entries get before any heavy hitter. They are
        preferred, not protected: how many there are depends on the budget.
    """

    stateful: ClassVar[bool] = True
    sees_span: ClassVar[bool] = True  # every query counts once
    recent_share: float = parameter(0.5, between(0, 1), Range(0.05, 0.95))

    def observe(self, view: CacheView) -> np.ndarray:
        """Add what the queries since the last compression paid to each entry."""
        paid = np.zeros(view.n_entries)  # in double precision: a prompt adds up thousands of small weights
        for weights in attention_blocks(view):
            paid += weights.mean(axis=0).sum(axis=0, dtype=np.float64)
        return (noted(view) + paid).astype(np.float32)

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


def value_sizes(view: CacheView) -> np.ndarray:
    """Give the L1 norm of every held value; float32 (n_entries,)."""
    assert view.values is not None
    return np.abs(view.values).sum(axis=-1)
