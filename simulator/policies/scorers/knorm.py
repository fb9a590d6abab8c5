"""Key norm: keep the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
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
    recent: int = parameter(0, at_least(0), Range(0, 32))

    def score(self, view: CacheView) -> np.ndarray:
        """Score by minus the norm."""
        return -np.sqrt(np.einsum("jd,jd->j", view.keys, view.keys))
