"""SnapKV at decode time: attention of the last queries, pooled over neighbours (R-KV's variant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.policies.scorers.window import EvictableWindow
from simulator.policies.view import CacheView, LayerView


@dataclass(frozen=True)
class SnapKV(EvictableWindow):
    """Keep what the last ``window`` queries attend to.

    Notes
    -----
    This is the decode-time baseline of R-KV: softmax over the evictable entries only (the window's own keys
    are left out of the denominator), mean over the window's queries, max-pooling. SnapKV itself compresses
    the prompt once, normalises over all keys and keeps a cache per query head.

    References
    ----------
    Li et al. 2024 (arXiv 2404.14469), section 4; R-KV, arXiv 2505.24133, baseline of section 4.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469; decode-time form of R-KV"

    def score(self, view: CacheView) -> np.ndarray:
        """Score by pooled attention; zero in the window."""
        return SnapKV.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Any = None) -> list[np.ndarray]:
        """Score all KV heads at once."""
        return self.importance(layer)
