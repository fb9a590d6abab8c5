"""SnapKV at decode time: attention of the last queries, pooled over neighbours (R-KV's variant)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels.attention import max_pool, mean_weights, merge_logits
from simulator.kernels.scratch import scratch
from simulator.kernels.spans import addresses, n_panels, pool_window_attention
from simulator.kernels.tiles import ROWS, WIDTH
from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Choices, Range, Ranges
from simulator.policies.view import CacheView

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
        return self.importance([view])[0]

    def score_heads(self, views: Sequence[CacheView]) -> Sequence[np.ndarray]:
        """Score a layer's KV heads at once."""
        # A subclass may score a head in a way of its own.
        return self.importance(views) if type(self).score is SnapKV.score else super().score_heads(views)

    def importance(self, views: Sequence[CacheView]) -> list[np.ndarray]:
        """Give what the windows attend to, pooled over neighbours; zero in the windows themselves."""
        if self.group_reduce == "max_logits":
            return pooled_attention(views, self.window, self.kernel_size)
        found = []
        for view in views:
            scores = np.zeros(view.n_entries, np.float32)
            n_candidates = view.n_entries - self.window
            if n_candidates > 0:
                weights = window_attention(view, n_candidates, self.group_reduce)
                max_pool(weights, self.kernel_size, scores[:n_candidates])
            found.append(scores)
        return found


def pooled_attention(views: Sequence[CacheView], window: int, kernel_size: int) -> list[np.ndarray]:
    """Do for several heads what ``window_attention`` with ``max_logits``, and pooling, do for one."""
    products = [view.known_products for view in views]
    # Where products are known nobody reads what they were made of.
    keys, queries = (
        [
            np.ascontiguousarray(getattr(view, name)) if known is None else None
            for view, known in zip(views, products, strict=True)
        ]
        for name in ("keys", "queries")
    )
    group_size, n_queries, head_dim = views[0].queries.shape
    lengths = np.array([view.n_entries for view in views])
    n_most = int(lengths.max())
    scores = np.zeros((len(views), n_most), np.float32)
    pool_window_attention(
        addresses(keys),
        lengths - window,
        addresses(queries),
        group_size,
        n_queries,
        head_dim,
        np.float32(views[0].scale),
        kernel_size,
        addresses(products),
        scratch(n_most + ROWS, n_panels(group_size * n_queries) * WIDTH + n_queries + 1).reshape(-1),
        scores,
    )
    return [own[:n] for own, n in zip(scores, lengths, strict=True)]


def window_attention(view: CacheView, n_candidates: int, group_reduce: str) -> np.ndarray:
    """Average the window's attention over the first ``n_candidates`` slots; float32 (n_candidates,)."""
    group_size, n_window, head_dim = view.queries.shape
    n_columns = group_size * n_window
    products = scratch(n_candidates, n_columns)
    np.matmul(view.keys[:n_candidates], view.queries.reshape(n_columns, head_dim).T, out=products)
    n_merged = group_size if group_reduce == "max_logits" else 1
    # The row maximum is taken off first: logits reach 100 and float32 exp overflows at 88.
    weights = np.empty((n_columns // n_merged, n_candidates), np.float32)
    merge_logits(products, np.float32(view.scale), n_merged, 1, n_window, weights)
    np.exp(weights, out=weights)
    means = np.empty(n_candidates, np.float32)
    mean_weights(weights, group_size if group_reduce == "max_weights" else 1, means)
    return means
