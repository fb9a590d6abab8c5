"""An observation window: what its last queries attend to, as R-KV and as SnapKV's paper compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.kernels.attention import max_pool
from simulator.kernels.windows import window_importance
from simulator.policies.attention import held_attention, leading_attention
from simulator.policies.parts import SLOT_ORDERS, Scorer
from simulator.policies.ranges import Choices, Limit, Range, at_least, one_of, parameter
from simulator.policies.view import CacheView, LayerView

GROUP_REDUCTIONS = ("max_logits", "mean_weights", "max_weights")
POOLS = ("max", "avg")
_ODD = Limit(lambda size: size >= 1 and size % 2 == 1, "an odd number")
_OBSERVED, _POOLED = Range(1, 32, log=True), Range(1, 15, step=2)


@dataclass(frozen=True)
class EvictableWindow(Scorer):
    """Base of scorers whose softmax runs over the evictable entries only.

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
    """

    window: int = parameter(8, at_least(1), _OBSERVED)
    kernel_size: int = parameter(7, _ODD, _POOLED)
    group_reduce: str = parameter("max_logits", one_of(GROUP_REDUCTIONS), Choices(GROUP_REDUCTIONS))
    slot_order: str = parameter("chronological", one_of(SLOT_ORDERS))

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    @property
    def reuses_products(self) -> bool:
        """Whether the window's products are of use: only where a group is one before its softmax."""
        return self.group_reduce == "max_logits"

    def n_left_out(self, view: CacheView | LayerView) -> int:
        """Count the last entries that are not scored: those of the window, as far as they are protected."""
        return min(self.window, self.ends(view).last)

    def importance(self, layer: LayerView) -> list[np.ndarray]:
        """Give each KV head's pooled attention, zero where not scored; float32 (n_entries,) each."""
        if self.n_left_out(layer) < self.window:
            return [self._causal_importance(view) for view in layer.heads]
        return window_importance(
            layer.keys,
            layer.queries,
            scale=layer.scale,
            n_left_out=self.window,
            kernel_size=self.kernel_size,
            group_reduce=self.group_reduce,
            products=layer.products,
        )

    def _causal_importance(self, view: CacheView) -> np.ndarray:
        """Give what ``importance`` gives where some of the window are candidates, seen by later queries."""
        scores = np.zeros(view.n_entries, np.float32)
        n_candidates = view.n_entries - self.n_left_out(view)
        if n_candidates > 0:
            merged = self.group_reduce == "max_logits"
            weights = leading_attention(view, n_candidates, merged=merged)
            reduced = weights.max(axis=0) if self.group_reduce == "max_weights" else weights.mean(axis=0)
            max_pool(reduced.mean(axis=0), self.kernel_size, scores[:n_candidates])
        return scores


@dataclass(frozen=True)
class HeldWindow(Scorer):
    """Base of scorers whose softmax runs over all that is held, the window's own entries included.

    Attributes
    ----------
    window : int
        Observed queries; as many recent entries are protected.
    kernel_size : int
        Width of the pooling over neighbouring slots outside the window, odd.
    pool : str
        ``max``, cut at both ends, or ``avg``, which pads with zeros and always divides by ``kernel_size``,
        so that the first and last candidates lose.
    slot_order : str
        ``score`` lays survivors out as the published code does, so that pooling meets other neighbours from
        the second compression on.
    """

    window: int = parameter(32, at_least(1), _OBSERVED)
    kernel_size: int = parameter(7, _ODD, _POOLED)
    pool: str = parameter("max", one_of(POOLS), Choices(POOLS))
    slot_order: str = parameter("chronological", one_of(SLOT_ORDERS))

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    def importance(self, view: CacheView) -> np.ndarray:
        """Give the pooled attention to a KV head's entries; float32 (n_entries,).

        It is zero for the window's own as far as they are protected.
        """
        scores = np.zeros(view.n_entries, np.float32)
        n_candidates = view.n_entries - min(self.window, self.ends(view).last)
        if n_candidates > 0:
            weights = held_attention(view)[..., :n_candidates].mean(axis=0).mean(axis=0)
            pooled = scores[:n_candidates]
            if self.pool == "max":
                max_pool(weights, self.kernel_size, pooled)
            else:
                pooled[:] = average_pool(weights, self.kernel_size)
        return scores


def average_pool(values: np.ndarray, kernel_size: int) -> np.ndarray:
    """Average over ``kernel_size`` neighbours, zeros beyond both ends; float32 (n,)."""
    padded = np.pad(values, kernel_size // 2)
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, kernel_size)  # (n, kernel_size)
    # In double precision, so that neighbours in another order give the same average.
    return (neighbours.sum(axis=-1, dtype=np.float64) / kernel_size).astype(np.float32)
