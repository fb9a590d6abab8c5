"""Layer budgets that follow a demand measured while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import robustify
from simulator.policies.attention import held_attention
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Limit, Range, at_least, between, parameter
from simulator.policies.view import CacheView
from simulator.policies.wave import entries_to_hold


@dataclass(frozen=True)
class WaveDynamic(LayerAllocator):
    """Budgets that follow each layer's demand of now, for models whose wave depends on the task.

    Attributes
    ----------
    layer_delta : int
        Decode steps between reallocations; 0 divides once, after the prompt.
    demand_window : int
        How many of the last queries the demand is measured on.
    rho : float
        The attention mass to hold.
    gamma, layer_floor, layer_cap : float
        As for the wave.

    Notes
    -----
    The demand is measured as for the stored wave: the fewest entries that hold ``rho`` of a query's
    attention, averaged over the GQA group before and over queries and KV heads after. Only what is held can
    be attended to, so an entry that was evicted counts no more, and a layer that holds little cannot show
    that it needs much. The paper names this fallback without its interval or sample; both are parameters.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), appendix C.
    """

    name: ClassVar[str] = "wave-dynamic"
    source: ClassVar[str] = "ReasonAlloc, arXiv 2606.11164, appendix C"
    dynamic: ClassVar[bool] = True
    layer_delta: int = parameter(128, at_least(0), Range(32, 512, log=True))
    demand_window: int = parameter(8, at_least(1))
    rho: float = parameter(0.93, Limit(lambda rho: 0 < rho < 1, "between 0 and 1"), Range(0.7, 0.99))
    gamma: float = parameter(0.5, between(0, 4), Range(0.1, 2.0))
    layer_floor: float = parameter(0.25, between(0, 1), Range(0.05, 0.9))
    layer_cap: float = parameter(2.0, at_least(1), Range(1.1, 4.0))

    @property
    def window(self) -> int:
        """Queries observed."""
        return self.demand_window

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Measure every layer's demand and robustify it."""
        return robustify(
            np.array([self._demand(views) for views in request.views]),
            request.n_layers * request.entries,
            exponent=self.gamma,
            floor=self.layer_floor,
            cap=self.layer_cap,
            protected=request.protected,
        )

    def _demand(self, views: Sequence[CacheView]) -> float:
        counts = [entries_to_hold(held_attention(view).mean(axis=0), self.rho) for view in views]
        return float(np.mean(counts))
