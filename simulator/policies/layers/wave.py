"""Budgets that follow the model's measured demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import robustify
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Range, at_least, between, parameter
from simulator.policies.tables import wave_of


@dataclass(frozen=True)
class WaveLayers(LayerAllocator):
    """Budgets that follow the model's measured demand, the Reasoning Wave (ReasonAlloc level I).

    Attributes
    ----------
    gamma : float
        Smoothing exponent of the demand.
    layer_floor, layer_cap : float
        Bounds of a layer's budget, as multiples of the mean.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), level I. The demand is measured by ``sim calibrate``.
    """

    name: ClassVar[str] = "wave"
    source: ClassVar[str] = "ReasonAlloc, arXiv 2606.11164, level I"
    needs: ClassVar[frozenset[str]] = frozenset({"wave"})
    gamma: float = parameter(0.5, between(0, 4), Range(0.1, 2.0))
    layer_floor: float = parameter(0.25, between(0, 1), Range(0.05, 0.9))
    layer_cap: float = parameter(2.0, at_least(1), Range(1.1, 4.0))

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Robustify the model's demand; raises as ``tables.wave_of``."""
        demand = np.asarray(wave_of(request).demand, np.float64)
        return robustify(
            demand,
            request.n_layers * request.entries,
            exponent=self.gamma,
            floor=self.layer_floor,
            cap=self.layer_cap,
            protected=request.protected,
        )
