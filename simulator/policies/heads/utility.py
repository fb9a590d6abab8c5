"""Budgets that follow how many of a head's entries win in one contest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import robustify
from simulator.policies.parts import HeadAllocator, HeadRequest
from simulator.policies.ranges import Choices, Range, at_least, between, one_of, parameter

POOLINGS = ("none", "length")


@dataclass(frozen=True)
class UtilityHeads(HeadAllocator):
    """Budgets that follow how many of a head's entries win in one contest (ReasonAlloc level II).

    Attributes
    ----------
    delta : int
        Decode steps between reallocations. One takes effect at a compression, so it is carried out at the
        first compression at which it is due; a ``delta`` below the buffer acts as the buffer.
    beta : float
        Smoothing exponent of the demand.
    mu, head_cap : float
        Bounds of a head's budget, as multiples of the equal share.
    pooling : str
        Scale of the contest: ``none`` pools the scores as they are; ``length`` multiplies them by the
        head's number of evictable entries, since scores normalised over a longer head are smaller.

    Notes
    -----
    All entries of the layer compete: the threshold is the K-th largest score, K being the layer's budget,
    and a head's demand is how many of its entries reach it. Protected entries always do.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), level II. The paper leaves the pooling open.
    """

    name: ClassVar[str] = "utility"
    source: ClassVar[str] = "ReasonAlloc, arXiv 2606.11164, level II"
    delta: int = parameter(128, at_least(1), Range(32, 512, log=True))
    beta: float = parameter(0.5, between(0, 4), Range(0.1, 2.0))
    mu: float = parameter(0.25, between(0, 1), Range(0.0, 0.9))
    head_cap: float = parameter(2.0, at_least(1), Range(1.1, 4.0))
    pooling: str = parameter("none", one_of(POOLINGS), Choices(POOLINGS))

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Count each head's winners and robustify the counts."""
        scores, total = request.scores, request.total
        if self.pooling == "length":
            scores = [s * np.float32(np.isfinite(s).sum()) for s in scores]
        pooled = np.concatenate(scores)
        if total >= len(pooled):
            demand = np.array([len(s) for s in scores], np.float64)
        else:
            threshold = np.partition(pooled, len(pooled) - total)[len(pooled) - total]
            demand = np.array([(s >= threshold).sum() for s in scores], np.float64)
        return robustify(
            demand,
            total,
            exponent=self.beta,
            floor=self.mu,
            cap=self.head_cap,
            protected=request.protected,
        )
