"""SnapKV at decode time: attention of the last queries, pooled over neighbours (R-KV's variant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.kernels.windows import window_importance
from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Choices, Range, Ranges
from simulator.policies.view import CacheView, LayerView

GROUP_REDUCTIONS = ("max_logits", "mean_weights", "max_weights")
SLOT_ORDERS = ("chronological", "score")


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Keep what the last ``window`` queries attend to.

    Attributes
    ----------
    window : int
        Observed queries; as many recent entries are protected.
    kernel_size : int
        Width of the max-pooling over neighbouring slots, odd.
    group_reduce : str
        How a GQA group becomes one: ``max_logits`` before the softmax, or ``mean_weights`` or
        ``max_weights`` after it.
    slot_order : str
        ``score`` lays survivors out as the published code does, so that pooling meets other neighbours from
        the second compression on.

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
    searched: ClassVar[Ranges] = {
        "window": Range(1, 32, log=True),
        "kernel_size": Range(1, 15, step=2),
        "group_reduce": Choices(("max_logits", "mean_weights", "max_weights")),
    }
    window: int = 8
    kernel_size: int = 7
    group_reduce: str = "max_logits"
    slot_order: str = "chronological"

    def __post_init__(self) -> None:
        refuse_unless(self.window >= 1, "window", self.window, "1 or more")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        refuse_unless(odd, "kernel_size", self.kernel_size, "an odd number")
        known = self.group_reduce in GROUP_REDUCTIONS
        refuse_unless(known, "group_reduce", self.group_reduce, ", ".join(GROUP_REDUCTIONS))
        known = self.slot_order in SLOT_ORDERS
        refuse_unless(known, "slot_order", self.slot_order, ", ".join(SLOT_ORDERS))

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    @property
    def reuses_products(self) -> bool:
        """Whether the window's products are of use: only where a group is one before its softmax."""
        return self.group_reduce == "max_logits"

    def score(self, view: CacheView) -> np.ndarray:
        """Score by pooled attention; zero in the window."""
        return SnapKV.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Any = None) -> list[np.ndarray]:
        """Score all KV heads at once."""
        return window_importance(
            layer.keys,
            layer.queries,
            scale=layer.scale,
            n_left_out=self.window,
            kernel_size=self.kernel_size,
            group_reduce=self.group_reduce,
            products=layer.products,
        )
