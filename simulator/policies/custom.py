"""Budgets in proportions that the user gives, to try what no published allocator does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.apportion import robustify
from simulator.policies.base import HeadAllocator, HeadRequest, LayerAllocator, LayerRequest
from simulator.policies.heads import ONCE
from simulator.policies.tables import head_shares, layer_shares, refuse_bad_shares


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
    layer_shares: str = ""

    def __post_init__(self) -> None:
        refuse_bad_shares("layer_shares", self.layer_shares)

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Divide in proportion.

        Raises
        ------
        MissingDataError
            If the file is missing, or there is not one number per layer.
        UserError
            If no numbers are given, or the file holds something else.
        """
        shares = layer_shares(self.layer_shares, request)
        return in_proportion(shares, request.n_layers * request.entries, request.protected)


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
    files: ClassVar[tuple[str, ...]] = ("head_shares",)
    head_shares: str = ""

    def __post_init__(self) -> None:
        refuse_bad_shares("head_shares", self.head_shares)

    @property
    def delta(self) -> int:
        """Divide once."""
        return ONCE

    def table(self, request: LayerRequest) -> np.ndarray:
        """Give the proportions of every layer.

        Raises
        ------
        MissingDataError
            If the file is missing, or there is not one number per KV head.
        UserError
            If no numbers are given, or the file holds something else.
        """
        return head_shares(self.head_shares, request)

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Divide in proportion."""
        assert request.table is not None
        return in_proportion(request.table, request.total, request.protected)


def in_proportion(shares: np.ndarray, total: int, protected: int) -> tuple[np.ndarray, bool]:
    """Divide a total in proportion, with no bounds but the protected entries."""
    return robustify(shares, total, exponent=1, floor=0, cap=len(shares), protected=protected)
