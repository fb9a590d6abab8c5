"""The same budget for every KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.heads.shares import equal_shares
from simulator.policies.parts import HeadAllocator, HeadRequest


@dataclass(frozen=True)
class UniformHeads(HeadAllocator):
    """The same budget for every KV head."""

    name: ClassVar[str] = "uniform"

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Give every head its equal share."""
        return equal_shares(request.total, request.n_heads), False
