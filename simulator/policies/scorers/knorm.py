"""Key norm: keep the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Range, Ranges
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Score a key by minus its L2 norm.

    Attributes
    ----------
    recent : int
        Last entries protected; the paper protects none.

    Notes
    -----
    The paper's code leaves the first two layers whole; here every layer evicts, and layer budgets are the
    layer allocator's.

    References
    ----------
    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv 2406.11430), section 3.
    """

    name: ClassVar[str] = "knorm"
    source: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"
    searched: ClassVar[Ranges] = {"recent": Range(0, 32)}
    recent: int = 0

    def __post_init__(self) -> None:
        refuse_unless(self.recent >= 0, "recent", self.recent, "0 or more")

    def score(self, view: CacheView) -> np.ndarray:
        """Score by minus the norm."""
        return -np.sqrt(np.einsum("jd,jd->j", view.keys, view.keys))
