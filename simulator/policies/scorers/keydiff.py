"""KeyDiff: evict the keys that point where most keys point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.view import CacheView

# Smallest norms divided by, as the published code does; they keep a zero key finite.
_KEY_EPSILON, _COSINE_EPSILON = 1e-12, 1e-8


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Score a key by how little it resembles the mean direction of all keys held.

    Attributes
    ----------
    recent : int
        Last entries protected; the paper protects none.

    Notes
    -----
    The score is minus the cosine of a key to the mean of the normalised keys of its KV head. The paper reads
    a prompt in blocks and compresses after each; here that is the trigger's choice. A prompt is scored whole.

    References
    ----------
    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction" (arXiv 2504.15364), section 3.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    recent: int = parameter(0, at_least(0), Range(0, 32))

    def score(self, view: CacheView) -> np.ndarray:
        """Score by minus the cosine to the mean direction."""
        keys = view.keys.astype(np.float64)
        # A sum of products, not BLAS: equal keys must get equal scores wherever they stand.
        norms = np.sqrt(np.einsum("jd,jd->j", keys, keys))
        anchor = (keys / np.maximum(norms, _KEY_EPSILON)[:, None]).mean(axis=0)
        anchor /= max(float(np.sqrt(anchor @ anchor)), _COSINE_EPSILON)
        cosines = np.einsum("jd,d->j", keys, anchor) / np.maximum(norms, _COSINE_EPSILON)
        return -cosines.astype(np.float32)
