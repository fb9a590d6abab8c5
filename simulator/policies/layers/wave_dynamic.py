"""Layer budgets that follow a demand measured while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import robustify
from simulator.policies.attention import held_attention
from simulator.policies.parts import LayerAllocator, LayerRequest, refuse_unless
from simulator.policies.ranges import Range, Ranges
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
    searched: ClassVar[Ranges] = {
        "layer_delta": Range(32, 512, log=True),
        "rho": Range(0.7, 0.99),
        "gamma": Range(0.1, 2.0),
        "layer_floor": Range(0.05, 0.9),
        "layer_cap": Range(1.1, 4.0),
    }
    layer_delta: int = 128
    demand_window: int = 8
    rho: float = 0.93
    gamma: float = 0.5
    layer_floor: float = 0.25
    layer_cap: float = 2.0

    def __post_init__(self) -> None:
        refuse_unless(self.layer_delta >= 0, "layer_delta", self.layer_delta, "0 or more")
        refuse_unless(self.demand_window >= 1, "demand_window", self.demand_window, "1 or more")
        refuse_unless(0 < self.rho < 1, "rho", self.rho, "between 0 and 1")
        refuse_unless(0 <= self.gamma <= 4, "gamma", self.gamma, "0 to 4")
        refuse_unless(0 <= self.layer_floor <= 1, "layer_floor", self.layer_floor, "0 to 1")
        refuse_unless(self.layer_cap >= 1, "layer_cap", self.layer_cap, "1 or more")

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
