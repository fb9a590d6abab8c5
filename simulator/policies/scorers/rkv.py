"""R-KV: attention of the last queries, less the redundancy of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels.attention import take_off
from simulator.kernels.duplicates import Redundancy
from simulator.policies.ranges import Range, between, one_of, parameter
from simulator.policies.scorers.window import EvictableWindow
from simulator.policies.view import CacheView, LayerView

NO_MATCH = ("skip", "column0")


@dataclass(frozen=True)
class RKV(EvictableWindow):
    """Score ``alpha * importance - (1 - alpha) * redundancy``.

    Attributes
    ----------
    alpha : float
        Weight of importance, in [0, 1]. The paper and its README use 0.1, the code's default is 0.07.
    similarity_threshold : float
        Cosine above which (strictly) one key duplicates another.
    no_match : str
        What a key without duplicate does: ``skip`` spares nothing; ``column0`` spares slot 0, as the
        published code does.

    Notes
    -----
    Importance is SnapKV's. Redundancy is the softmax, over all entries held, of each key's mean cosine to
    all keys, where every key spares its newest duplicate ("newest" is the largest slot: the latest position
    unless ``slot_order=score``). ``slot_order=score,no_match=column0`` reproduces the published code.

    References
    ----------
    Cai et al. 2025, "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv 2505.24133).
    """

    name: ClassVar[str] = "rkv"
    source: ClassVar[str] = "Cai et al. 2025, arXiv 2505.24133"
    alpha: float = parameter(0.1, between(0, 1), Range(0.01, 1.0, log=True))
    similarity_threshold: float = parameter(0.5, between(-1, 1), Range(0.2, 0.95))
    no_match: str = parameter("skip", one_of(NO_MATCH))

    def score(self, view: CacheView) -> np.ndarray:
        """Score the evictable entries; zero in the window."""
        return RKV.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Redundancy | None = None) -> list[np.ndarray]:
        """Score all KV heads at once."""
        scores = self.importance(layer)
        repeated = (memory or self._redundancy()).shares(layer.keys, layer.positions)
        for own, shares in zip(scores, repeated, strict=True):
            n_candidates = max(0, len(own) - self.n_left_out(layer))
            take_off(own[:n_candidates], np.float32(self.alpha), shares, np.float32(1 - self.alpha))
        return scores

    def new_memory(self) -> Redundancy | None:
        """Give what remembers which entries repeat each other, if those keep their order."""
        return self._redundancy() if self.slot_order == "chronological" else None

    def _redundancy(self) -> Redundancy:
        return Redundancy(self.similarity_threshold, spare_column0=self.no_match == "column0")
