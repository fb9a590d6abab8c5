"""What a window of queries attends to in a layer's KV heads, pooled over neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray

from simulator.kernels.attention import VECTORISE, exp, max_pool, mean_weights, merge_logits
from simulator.kernels.compiled import compiled
from simulator.kernels.scratch import scratch
from simulator.kernels.tiles import ROWS, WIDTH, can_pair, fill_panels, multiply, n_panels
from simulator.kernels.widening import addresses, floats_at, narrow


def window_importance(
    keys: Sequence[np.ndarray],
    queries: np.ndarray,
    *,
    scale: float,
    n_left_out: int,
    kernel_size: int,
    group_reduce: str = "max_logits",
    products: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Give the mean attention of each KV head's queries to its keys, pooled over neighbouring slots.

    Parameters
    ----------
    keys : sequence of float32 (n_entries, head_dim), one per KV head
    queries : float32 (n_kv_heads, group_size, n_queries, head_dim)
    scale : float
        Attention scale.
    n_left_out : int
        Last entries that are neither attended to nor judged.
    kernel_size : int
        Width of the max-pooling, odd; cut at both ends.
    group_reduce : str
        How a GQA group becomes one: ``max_logits`` before the softmax, ``mean_weights`` or ``max_weights``
        after it.
    products : sequence of float32 (n_entries, n_queries * group_size), optional
        Dot products of keys and queries where they are known already, by query and then member of the group;
        of use with ``max_logits``.

    Returns
    -------
    list of float32 (n_entries,); zero for entries left out.
    """
    lengths = np.array([len(own) for own in keys])
    n_kv_heads, group_size, n_queries, head_dim = queries.shape
    scores = np.zeros((n_kv_heads, int(lengths.max())), np.float32)
    if group_reduce == "max_logits":
        keys, queries = [np.ascontiguousarray(own) for own in keys], np.ascontiguousarray(queries)
        n_columns = n_panels(group_size * n_queries) * WIDTH + n_queries + 1
        pool_window_attention(
            addresses(keys),
            lengths - n_left_out,
            addresses(list(queries)),
            group_size,
            n_queries,
            head_dim,
            np.float32(scale),
            kernel_size,
            addresses([None] * n_kv_heads if products is None else products),
            scratch(scores.shape[1] + ROWS, n_columns).reshape(-1),
            scores,
        )
    else:
        for own, asked, n, pooled in zip(keys, queries, lengths - n_left_out, scores, strict=True):
            if n > 0:
                max_pool(window_attention(own[:n], asked, scale, group_reduce), kernel_size, pooled[:n])
    return [own[:n] for own, n in zip(scores, lengths, strict=True)]


def window_attention(keys: np.ndarray, queries: np.ndarray, scale: float, group_reduce: str) -> np.ndarray:
    """Average the attention of a KV head's queries to all of the keys given; parameters as above.

    Returns
    -------
    float32 (n_entries,)
    """
    group_size, n_queries, head_dim = queries.shape
    n_columns = group_size * n_queries
    products = scratch(len(keys), n_columns)
    np.matmul(keys, queries.reshape(n_columns, head_dim).T, out=products)
    n_merged = group_size if group_reduce == "max_logits" else 1
    # The row maximum is taken off first: logits reach 100 and float32 exp overflows at 88.
    weights = np.empty((n_columns // n_merged, len(keys)), np.float32)
    merge_logits(products, np.float32(scale), n_merged, 1, n_queries, weights)
    np.exp(weights, out=weights)
    means = np.empty(len(keys), np.float32)
    mean_weights(weights, group_size if group_reduce == "max_weights" else 1, means)
    return means


@compiled(nogil=True, fastmath=VECTORISE)
def _exponentials(logits):
    for i in range(logits.shape[0]):
        logits[i] = exp(logits[i])


@compiled(nogil=True)
def _multiply_window(keys, n, queries, group_size, n_queries, paired, panels, products):
    """Write the dot products of ``n`` keys with a window's queries, by query and then member of the group."""
    depth = panels.shape[1]
    strides = np.array([0, 4 * depth * n_queries, 4 * depth])
    fill_panels(queries, strides, 0, group_size, n_queries, panels)
    for slot in range(0, n, ROWS):
        for panel in range(panels.shape[0]):
            tile = products[slot : slot + ROWS, panel * WIDTH : (panel + 1) * WIDTH]
            multiply(paired, keys + 4 * depth * slot, min(ROWS, n - slot), panels[panel], tile)


@compiled(nogil=True)
def pool_window_attention(
    keys, n_candidates, queries, group_size, n_queries, head_dim, scale, kernel_size, known, room, scores
):
    """Write what ``window_importance`` gives to ``scores``, float32 (n_kv_heads, n_most).

    ``keys``, ``queries`` and ``known``, int64 (n_kv_heads,), are addresses of each head's keys, queries and
    products, row by row, 0 where products have to be found; ``n_candidates``, int64 (n_kv_heads,), says how
    many leading entries are judged. ``room`` has ``n_panels(group_size * n_queries) * WIDTH + n_queries + 1``
    numbers for each of the most candidates and of ``ROWS`` more.
    """
    n_columns = group_size * n_queries
    n_used = n_panels(n_columns)
    panels = np.empty(n_used * head_dim * WIDTH, np.float32)
    may_pair = can_pair(head_dim)
    few_keys = np.empty(scores.shape[1] * head_dim if may_pair else 0, np.uint16)
    few_queries = np.empty(n_columns * head_dim if may_pair else 0, np.uint16)
    for kv_head in range(keys.shape[0]):
        n = n_candidates[kv_head]
        if n <= 0:
            continue
        n_rows = -(-n // ROWS) * ROWS
        if known[kv_head]:
            products = carray(floats_at(known[kv_head]), (n, n_columns))
        else:
            products = room[: n_rows * n_used * WIDTH].reshape(n_rows, n_used * WIDTH)
            at, asked, depth = keys[kv_head], queries[kv_head], head_dim
            paired = may_pair and narrow(asked, n_columns * head_dim, few_queries)
            paired = paired and narrow(at, n * head_dim, few_keys)
            if paired:
                at, asked, depth = (
                    np.int64(few_keys.ctypes.data),
                    np.int64(few_queries.ctypes.data),
                    head_dim // 2,
                )
            used = panels[: n_used * depth * WIDTH].reshape(n_used, depth, WIDTH)
            _multiply_window(at, n, asked, group_size, n_queries, paired, used, products)
        rest = room[n_rows * n_used * WIDTH :]
        weights = rest[: n * n_queries].reshape(n_queries, n)
        # The row maximum is taken off first: logits reach 100 and float32 exp overflows at 88.
        merge_logits(products, scale, group_size, group_size, 1, weights)
        _exponentials(rest[: n * n_queries])
        means = rest[n * n_queries : n * (n_queries + 1)]
        mean_weights(weights, 1, means)
        max_pool(means, kernel_size, scores[kv_head, :n])
    few_keys[:0], few_queries[:0] = 0, 0  # they have to live until here: they are read by address
