"""Attention of the observed queries to what a KV head holds: the base of scores that look at queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from simulator.policies.view import CacheView

# Weights of one block of queries, in float32: 8 MB.
_BLOCK_ELEMENTS = 2**21


def held_attention(view: CacheView, *, merged: bool = False) -> np.ndarray:
    """Give the causal softmax attention of all observed queries to the held entries.

    This is what a model sees that has evicted the others: the weights of a row sum to 1 over the entries
    that are not in its future, or are all zero where a head holds nothing of its past. ``merged`` takes the
    largest logit of a group for one query's, before the softmax.

    Returns
    -------
    float32 (group_size, n_queries, n_entries); (1, n_queries, n_entries) if merged.
    """
    return np.concatenate(list(attention_blocks(view, merged=merged)), axis=1)


def leading_attention(view: CacheView, n: int, *, merged: bool = False) -> np.ndarray:
    """Give the attention of all observed queries to the first ``n`` slots, as if no others were held.

    Returns as of ``held_attention``, with ``n`` entries.
    """
    shown = replace(view, keys=view.keys[:n], positions=view.positions[:n], values=None, state=None)
    return held_attention(shown, merged=merged)


def attention_blocks(view: CacheView, *, merged: bool = False) -> Iterator[np.ndarray]:
    """Yield ``held_attention`` in blocks of queries, for spans too long to hold their weights at once."""
    group_size, n_queries, head_dim = view.queries.shape
    n_rows = max(1, _BLOCK_ELEMENTS // (group_size * max(1, view.n_entries)))
    for first in range(0, n_queries, n_rows):
        queries = view.queries[:, first : first + n_rows]
        products = queries.reshape(-1, head_dim) @ view.keys.T
        logits = products.reshape(group_size, -1, view.n_entries) * np.float32(view.scale)
        own = view.query_positions[first : first + n_rows]
        if merged:
            logits = logits.max(axis=0, keepdims=True)
        logits[:, view.positions > own[:, None]] = -np.inf
        # Subtract the row maximum first: logits reach 100 and float32 exp overflows at 88.
        largest = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0))
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1)
        yield weights
