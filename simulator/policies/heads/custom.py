"""Head budgets in proportions that the user gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import in_proportion
from simulator.policies.heads.shares import ONCE
from simulator.policies.parts import HeadAllocator, HeadRequest, LayerRequest
from simulator.policies.ranges import parameter
from simulator.policies.tables import SHARES, head_shares


@dataclass(frozen=True)
class CustomHeads(HeadAllocator):
    """Budgets in given proportions.

    Attributes
    ----------
    head_shares : str
        Numbers above 0 joined by ``/``, one per KV head and alike in all layers, or the path of a JSON file
        with a list of them per layer.

    Notes
    -----
    Protected entries as for layers. The budgets take effect at a layer's first compression.
    """

    name: ClassVar[str] = "custom"
    delta: ClassVar[int] = ONCE
    files: ClassVar[tuple[str, ...]] = ("head_shares",)
    head_shares: str = parameter("", SHARES)

    def table(self, request: LayerRequest) -> np.ndarray:
        """Give the proportions of every layer; raises as ``tables.head_shares``."""
        return head_shares(self.head_shares, request)

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Divide in proportion."""
        assert request.table is not None
        return in_proportion(request.table, request.total, request.protected)
