"""Budgets that follow a table of how much each head needs, measured before the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide, pooled_shares
from simulator.policies.heads.shares import ONCE
from simulator.policies.parts import HeadAllocator, HeadRequest, LayerRequest
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.tables import FollowsHeadTable


@dataclass(frozen=True)
class HeadKV(FollowsHeadTable, HeadAllocator):
    """Budgets that follow a static table of how much each head needs.

    Attributes
    ----------
    head_table : str
        Path of a JSON file: a list per layer of one number per KV head, or HeadKV's published files,
        ``{"layer-head": [scores]}`` of query heads. Empty: the entries each head needs, from the model's
        wave.
    head_beta : float
        A head is sure of ``1 - 1 / head_beta`` of its equal share; the rest is the pool that follows the
        table.

    Notes
    -----
    HeadKV pools over the whole model. Here the pool of a layer is divided over its heads; with the layer
    allocator ``table`` the layers' budgets follow the same table, and the two together differ from the paper
    only in that a head's minimum is a part of its layer's budget. The published code rounds every head on
    its own, keeps the observation window on top of the budget, and cuts off silently what a head is too
    short to hold; here totals are exact and include the protected entries, and ``redistribute`` hands on
    what short heads cannot use. A group of query heads counts with their sum, where the code's KV-head mode
    takes the mean; within one model these are the same.

    References
    ----------
    Fu et al. 2024, "HeadKV" (arXiv 2410.19258), and the code of KVCache-Factory.
    """

    name: ClassVar[str] = "headkv"
    source: ClassVar[str] = "Fu et al. 2024, arXiv 2410.19258"
    delta: ClassVar[int] = ONCE
    head_table: str = ""
    head_beta: float = parameter(1.01, at_least(1, finite=True), Range(0.2, 3.0))

    def table(self, request: LayerRequest) -> np.ndarray:
        """Give the table; raises as ``head_numbers``."""
        return self.head_numbers(request)

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Give the protected entries, the minimum and a share of the pool."""
        assert request.table is not None
        evictable = request.total - request.n_heads * request.protected
        shares = pooled_shares(request.table, evictable, self.head_beta)
        return request.protected + divide(shares, evictable), False
