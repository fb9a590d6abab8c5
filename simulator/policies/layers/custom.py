"""Layer budgets in proportions that the user gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import in_proportion
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import parameter
from simulator.policies.tables import SHARES, layer_shares


@dataclass(frozen=True)
class CustomLayers(LayerAllocator):
    """Budgets in given proportions.

    Attributes
    ----------
    layer_shares : str
        Numbers above 0 joined by ``/``, first layer first, or the path of a JSON file with a list of them.
        They are parts of the total: 128/64 at a mean of 96 gives just that.

    Notes
    -----
    A layer whose part is less than the protected entries gets those, and the others share what is left in
    their proportions.
    """

    name: ClassVar[str] = "custom"
    files: ClassVar[tuple[str, ...]] = ("layer_shares",)
    layer_shares: str = parameter("", SHARES)

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Divide in proportion; raises as ``tables.layer_shares``."""
        shares = layer_shares(self.layer_shares, request)
        return in_proportion(shares, request.n_layers * request.entries, request.protected)
