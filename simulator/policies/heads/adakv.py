"""Head budgets by how many entries win where a layer's heads compete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide
from simulator.policies.parts import HeadAllocator, HeadRequest
from simulator.policies.ranges import Choices, Range, between, one_of, parameter

FORMS = ("blend", "floor")


@dataclass(frozen=True)
class AdaKV(HeadAllocator):
    """Budgets by how many of a head's entries win where all of a layer's compete, at every compression.

    Attributes
    ----------
    form : str
        How heads are kept from starving. ``blend``, as in the paper and its code: a head's share is its wins
        times ``1 - uniform_share`` plus its equal share times ``uniform_share``. ``floor``, as in NVIDIA's
        kvpress: the best ``uniform_share`` of every head's equal share, rounded down, is safe, and the rest
        of the total goes to the best of all others.
    uniform_share : float
        1 is uniform and 0 fully adaptive. In the floor form anything above 0 makes at least one entry safe.

    Notes
    -----
    Protected entries do not compete and come on top. Scores are pooled as they are: one that is normalised
    within a head is smaller where the head is longer. Scores tied at the last place share the places that
    are left in proportion to how many each head has. The published code rounds heads one by one and may miss
    its total by a few entries; here it is exact. The paper compresses the prompt once; here heads are
    divided anew at every compression. kvpress can make no entry safe at very small budgets.

    References
    ----------
    Feng et al. 2024, "Ada-KV" (arXiv 2407.11550), and its code; the floor form is kvpress's
    ``AdaKVPress``.
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Feng et al. 2024, arXiv 2407.11550"
    delta: ClassVar[int] = 1  # at every compression
    form: str = parameter("blend", one_of(FORMS), Choices(FORMS))
    uniform_share: float = parameter(0.2, between(0, 1), Range(0.05, 0.95))

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Let the heads compete for the evictable entries."""
        evictable = request.total - request.n_heads * request.protected
        scores = [own[np.isfinite(own)] for own in request.scores]
        equal = evictable / request.n_heads
        if self.form == "blend":
            shares = wins(scores, evictable) * (1 - self.uniform_share) + equal * self.uniform_share
        else:
            # At least one, yet no more than every head can have.
            n_safe = min(max(int(self.uniform_share > 0), int(equal * self.uniform_share)), int(equal))
            safe = np.array([min(n_safe, len(own)) for own in scores])
            others = [np.sort(own)[: len(own) - n] for own, n in zip(scores, safe, strict=True)]
            shares = safe + wins(others, evictable - int(safe.sum()))
        return request.protected + divide(shares, evictable), False


def wins(scores: Sequence[np.ndarray], n_places: int) -> np.ndarray:
    """Count how many of each head's scores are among the best ``n_places``; float64 (n_heads,).

    Scores tied at the last place share what is left in proportion to their number, and places that nobody
    fills are shared alike, so that the sum is ``n_places``.
    """
    lengths = np.array([len(own) for own in scores], np.float64)
    unfilled = n_places - lengths.sum()
    if unfilled >= 0:
        return lengths + unfilled / len(scores)
    if n_places == 0:
        return np.zeros(len(scores))
    pooled = np.concatenate(scores)
    last = np.partition(pooled, len(pooled) - n_places)[len(pooled) - n_places]
    above = np.array([(own > last).sum() for own in scores], np.float64)
    tied = np.array([(own == last).sum() for own in scores], np.float64)
    return above + tied * ((n_places - above.sum()) / tied.sum())
