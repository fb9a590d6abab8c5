"""H2O: the attention that every entry has gathered so far, half of the budget left to the newest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.scorers.accumulated import AccumulatedAttention, noted
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class H2O(AccumulatedAttention):
    """Keep the heavy hitters: entries with the largest accumulated attention.

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

    def score(self, view: CacheView) -> np.ndarray:
        """Score by accumulated attention, the newest entries above all others."""
        return self.prefer_recent(view, noted(view))
