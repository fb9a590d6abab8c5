"""VATP: accumulated attention times the size of the value it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.scorers.accumulated import AccumulatedAttention, noted, value_sizes
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class VATP(AccumulatedAttention):
    """Score by accumulated attention times the L1 norm of the value.

    Attributes
    ----------
    sinks : int
        First positions protected: attention sinks have tiny values, which this score would evict first.

    Notes
    -----
    This is the paper's variant on H2O (it has another on Scissorhands), with H2O's deviations. The paper and
    its code (``sink_len``) keep the first 20 tokens. The code multiplies each step's attention by the norm
    before adding it up, which comes to the same, since an entry's value never changes. Its budgets are shares
    of the prompt's length, and it masks entries instead of freeing them.

    References
    ----------
    Guo et al. 2024, "Attention Score is not All You Need for Token Importance Indicator in KV Cache
    Reduction: Value Also Matters" (arXiv 2406.12335), section 3.
    """

    name: ClassVar[str] = "vatp"
    source: ClassVar[str] = "Guo et al. 2024, arXiv 2406.12335"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    sinks: int = parameter(20, at_least(0), Range(0, 16))

    def score(self, view: CacheView) -> np.ndarray:
        """Score by attention times value norm, the newest entries above all others."""
        return self.prefer_recent(view, noted(view) * value_sizes(view))
