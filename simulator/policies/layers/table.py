"""Layer budgets as the sums of an offline table over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide, pooled_shares
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.tables import FollowsHeadTable


@dataclass(frozen=True)
class TableLayers(FollowsHeadTable, LayerAllocator):
    """Budgets that follow the sum of a head table over each layer: HeadKV's part between layers.

    Attributes
    ----------
    head_table, head_beta
        As for HeadKV's heads. Naming both parts sets them for both.

    Notes
    -----
    As for HeadKV's heads.

    References
    ----------
    Fu et al. 2024, "HeadKV" (arXiv 2410.19258), and the code of KVCache-Factory.
    """

    name: ClassVar[str] = "table"
    source: ClassVar[str] = "Fu et al. 2024, arXiv 2410.19258, between layers"
    head_table: str = ""
    head_beta: float = parameter(1.01, at_least(1, finite=True), Range(0.2, 3.0))

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give the protected entries, the minimum and a share of the pool; raises as ``head_numbers``."""
        sums = self.head_numbers(request).sum(axis=1)
        evictable = request.n_layers * (request.entries - request.protected)
        return request.protected + divide(pooled_shares(sums, evictable, self.head_beta), evictable), False
