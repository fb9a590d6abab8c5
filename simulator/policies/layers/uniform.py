"""The same budget for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import LayerAllocator, LayerRequest


@dataclass(frozen=True)
class UniformLayers(LayerAllocator):
    """The same budget for every layer."""

    name: ClassVar[str] = "uniform"

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give every layer the mean."""
        return np.full(request.n_layers, request.entries, np.int64), False
