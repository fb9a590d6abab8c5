"""Layer budgets that follow how attention spreads and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide, fractions
from simulator.policies.attention import held_attention
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Range, at_least, between, parameter
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class Cake(LayerAllocator):
    """Budgets that follow how widely a layer's attention spreads, times how much it shifts, after the prompt.

    Attributes
    ----------
    cake_window : int
        How many of the prompt's last queries are observed.
    tau1, tau2 : float
        Temperatures of the spread and of the shift: a layer's preference is
        ``spread ** (1 / tau1) * shift ** (1 / tau2)``.

    Notes
    -----
    The spread is the entropy of the mean attention of the observed queries over what is held; the shift is
    the variance of each entry's attention over those queries, summed over the entries. Both are averaged
    over the layer's query heads.

    The published code sums the entropies of the single queries rather than taking that of their mean, and
    sums over heads; it leaves the window's own entries out of both terms, and divides variances by one less
    than the queries. Sums and divisors are alike in all layers and do not change the shares. The paper's
    cascade gives each layer the budget it would end with as soon as the prompt has passed through it, which
    saves memory during prefill and ends at the same division. The protected entries come on top of the
    shares. Preferences that are all zero, as for one observed query, count as equal. CAKE's own eviction
    score is not part of this.

    References
    ----------
    Qin et al. 2025, "CAKE" (arXiv 2503.12491), layer preferences.
    """

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = "Qin et al. 2025, arXiv 2503.12491"
    dynamic: ClassVar[bool] = True
    cake_window: int = parameter(32, at_least(1), Range(4, 32, log=True))
    tau1: float = parameter(1.0, between(0.1, 10), Range(0.2, 3.0))
    tau2: float = parameter(1.0, between(0.1, 10), Range(0.2, 3.0))

    @property
    def window(self) -> int:
        """Queries observed."""
        return self.cake_window

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give the protected entries plus a share of the rest by preference."""
        preferences = np.array([self._preference(views) for views in request.views])
        # A layer that hardly prefers anything still has to hold an entry.
        least = max(1, request.protected)
        evictable = request.n_layers * (request.entries - least)
        return least + divide(fractions(preferences) * evictable, evictable), False

    def _preference(self, views: Sequence[CacheView]) -> float:
        spread, shift = np.mean([spread_and_shift(view) for view in views], axis=0)
        return float(spread ** (1 / self.tau1) * shift ** (1 / self.tau2))


def spread_and_shift(view: CacheView) -> tuple[float, float]:
    """Give the entropy of the mean attention and the summed variance over the observed queries.

    Both are averaged over the GQA group.
    """
    weights = held_attention(view)
    mean = weights.mean(axis=1, dtype=np.float64)  # (group_size, n_entries)
    logs = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
    entropies = -(mean * logs).sum(axis=1)
    variances = weights.var(axis=1, dtype=np.float64).sum(axis=1)
    # A single entry has an entropy of zero, give or take a rounding error.
    return max(0.0, float(entropies.mean())), float(variances.mean())
