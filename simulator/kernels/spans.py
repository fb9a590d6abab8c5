"""Compiled loops over a layer's KV heads, so that one call measures, scores or searches them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from simulator.kernels.attention import (
    VECTORISE,
    add_tile_mass,
    exp,
    max_pool,
    mean_weights,
    merge_logits,
    raise_strongest,
)
from simulator.kernels.compiled import compiled
from simulator.kernels.tiles import ROWS, WIDTH, can_pair, fill_panel, hide_unseen, multiply
from simulator.kernels.widening import floats_at, narrow, widen_rows

# Keys that all queries of a span meet before the next ones: they stay in the cache meanwhile.
_BLOCK_KEYS = 40 * ROWS


@compiled()
def _first_of(numbers):
    """Do what ``address_of`` does in an eighth of the time, but not for float16, unknown to Numba."""
    return numbers.ctypes.data


def addresses(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """Give where float32 arrays begin, int64 (n,), 0 for None; to be kept while those are used."""
    return np.array([0 if own is None else _first_of(own) for own in arrays], np.int64)


@register_jitable
def n_panels(n_queries):
    """Count the panels that queries fill."""
    return -(-n_queries // WIDTH)


@compiled(nogil=True)
def _fill_panels(queries, strides, kind, group_size, n_tokens, panels):
    """Turn stored queries of a KV head, those of a token side by side, into panels; the rest is zero."""
    n_queries, depth = n_tokens * group_size, panels.shape[1]
    # Those that are to be widened first, and at the end a query of zeros.
    flat = np.zeros((WIDTH + 1) * depth, np.float32)
    nothing = np.int64(flat.ctypes.data) + 4 * WIDTH * depth
    rows = np.empty(WIDTH, np.int64)
    for panel in range(panels.shape[0]):
        first = panel * WIDTH
        for column in range(WIDTH):
            token, member = divmod(first + column, group_size)
            rows[column] = nothing
            if first + column < n_queries:
                rows[column] = queries + member * strides[1] + token * strides[2]
        if kind != 0:
            for member in range(group_size):
                # Its queries within the panel, one in every ``group_size``.
                start = max(-(-(first - member) // group_size), 0)
                stop = min(-(-(first + WIDTH - member) // group_size), n_tokens)
                at, target = member * strides[1] + start * strides[2], start * group_size + member - first
                step = group_size * depth
                widen_rows(queries + at, strides[2], kind, stop - start, depth, flat, target * depth, step)
            for column in range(min(n_queries - first, WIDTH)):
                rows[column] = np.int64(flat.ctypes.data) + 4 * column * depth
        fill_panel(rows, panels[panel])
    flat[0] = 0  # it has to live until here: rows are read by address


@njit(inline="always")
def _reach(slots, group_size, first):
    """Count the entries that all queries of the panel from ``first`` on see, and those that any sees."""
    last_token = min((first + WIDTH - 1) // group_size, slots.shape[0] - 1)
    return slots[first // group_size] + 1, slots[last_token] + 1


@compiled(nogil=True)
def measure_heads(keys, own, queries, strides, form, lse, scale, room, products, mass):
    """Write the full-cache attention mass that a span's queries find in what their KV heads hold.

    Parameters
    ----------
    keys : int64 (n_kv_heads,)
        Addresses of each head's keys, row by row: float32 (n_entries, head_dim), or as stored if ``form`` has
        pairs.
    own : int64 (n_kv_heads, n_tokens)
        Slot of each token's own entry, the last that its queries see; rising.
    queries : int
        Address of what is stored of them, (n_kv_heads, group_size, n_tokens, head_dim); the numbers of one
        stand side by side.
    strides : int64 (3,)
        Bytes from one KV head, member of its group, and token to the next.
    form : simulator.kernels.tiles.Form
    lse : float32 (n_kv_heads, group_size, n_tokens)
        Log-sum-exp of each query over the full causal cache.
    scale : float32
    room : float32 (n,)
        ``n_panels(group_size * n_tokens) * WIDTH * form.depth`` numbers.
    products : float32 (n_kv_heads, n_most, n_kept)
        Written with what the last of the queries, by token and then member of the group, have for dot
        products with the entries that all of them see.
    mass : float32 (n_kv_heads, group_size, n_tokens)
        Written.
    """
    n_kv_heads, group_size, n_tokens = lse.shape
    kind, depth, paired = form
    n_used = n_panels(n_tokens * group_size)
    first_kept = n_tokens * group_size - products.shape[2]
    panels = room[: n_used * depth * WIDTH].reshape(n_used, depth, WIDTH)
    shifts, sums = np.zeros((n_used, WIDTH), np.float32), np.empty((n_used, WIDTH), np.float32)
    tile = np.empty((ROWS, WIDTH), np.float32)
    for kv_head in range(n_kv_heads):
        slots = own[kv_head]
        _fill_panels(queries + kv_head * strides[0], strides, kind, group_size, n_tokens, panels)
        for token in range(n_tokens):
            for member in range(group_size):
                query = token * group_size + member
                shifts[query // WIDTH, query % WIDTH] = lse[kv_head, member, token]
        sums[:] = 0
        for block in range(0, slots[n_tokens - 1] + 1, _BLOCK_KEYS):
            for panel in range(n_used):
                first = panel * WIDTH
                seen_by_all, n_seen = _reach(slots, group_size, first)
                stop = min(block + _BLOCK_KEYS, n_seen)
                asked, shift, found = panels[panel], shifts[panel], sums[panel]
                for slot in range(block, stop, ROWS):
                    at = keys[kv_head] + 4 * depth * slot
                    multiply(paired, at, min(ROWS, stop - slot), asked, tile)
                    if first + WIDTH > first_kept:
                        _keep(tile, slot, stop, first, first_kept, products, kv_head)
                    if slot + ROWS > seen_by_all:
                        hide_unseen(tile, slot, slots, group_size, first)
                    add_tile_mass(tile, scale, shift, found)
        for token in range(n_tokens):
            for member in range(group_size):
                query = token * group_size + member
                mass[kv_head, member, token] = sums[query // WIDTH, query % WIDTH]


@njit(inline="always")
def _keep(tile, slot, stop, first, first_kept, products, kv_head):
    """Write a tile, of the entries from ``slot`` and the queries from ``first`` on, to where it is kept."""
    start = max(first_kept - first, 0)
    end = min(first_kept + products.shape[2] - first, WIDTH)
    at = first - first_kept
    for row in range(min(ROWS, stop - slot)):
        if start == 0 and end == WIDTH:
            # As wide as the tile, which vectorises.
            for column in range(WIDTH):
                products[kv_head, slot + row, at + column] = tile[row, column]
        else:
            for column in range(start, end):
                products[kv_head, slot + row, at + column] = tile[row, column]


@compiled(nogil=True)
def find_strongest(keys, slots, queries, strides, form, room, largest, strongest):
    """Write each query's largest product with the keys that it sees, and that key's slot, ties to the later.

    Parameters
    ----------
    keys : int
        Address of a KV head's keys, as of ``measure_heads``.
    slots : int64 (n_tokens,)
        Slot of each token's own entry, the last that its queries see; rising.
    queries, strides, form, room
        As of ``measure_heads``, of one KV head; ``strides`` keeps its first number.
    largest, strongest : float32 and int32 (group_size, n_tokens)
        Written.
    """
    group_size, n_tokens = largest.shape
    kind, depth, paired = form
    n_used = n_panels(n_tokens * group_size)
    panels = room[: n_used * depth * WIDTH].reshape(n_used, depth, WIDTH)
    _fill_panels(queries, strides, kind, group_size, n_tokens, panels)
    best, where = np.full((n_used, WIDTH), -np.inf, np.float32), np.zeros((n_used, WIDTH), np.int32)
    tile = np.empty((ROWS, WIDTH), np.float32)
    for block in range(0, slots[n_tokens - 1] + 1, _BLOCK_KEYS):
        for panel in range(n_used):
            first = panel * WIDTH
            seen_by_all, n_seen = _reach(slots, group_size, first)
            stop = min(block + _BLOCK_KEYS, n_seen)
            asked, most, found = panels[panel], best[panel], where[panel]
            for slot in range(block, stop, ROWS):
                multiply(paired, keys + 4 * depth * slot, min(ROWS, stop - slot), asked, tile)
                if slot + ROWS > seen_by_all:
                    hide_unseen(tile, slot, slots, group_size, first)
                raise_strongest(tile, slot, most, found)
    for token in range(n_tokens):
        for member in range(group_size):
            query = token * group_size + member
            largest[member, token] = best[query // WIDTH, query % WIDTH]
            strongest[member, token] = where[query // WIDTH, query % WIDTH]


@compiled(nogil=True, fastmath=VECTORISE)
def _exponentials(logits):
    for i in range(logits.shape[0]):
        logits[i] = exp(logits[i])


@compiled(nogil=True)
def _multiply_window(keys, n, queries, group_size, n_queries, paired, panels, products):
    """Write the dot products of ``n`` keys with a window's queries, by query and then member of the group."""
    depth = panels.shape[1]
    strides = np.array([0, 4 * depth * n_queries, 4 * depth])
    _fill_panels(queries, strides, 0, group_size, n_queries, panels)
    for slot in range(0, n, ROWS):
        for panel in range(panels.shape[0]):
            tile = products[slot : slot + ROWS, panel * WIDTH : (panel + 1) * WIDTH]
            multiply(paired, keys + 4 * depth * slot, min(ROWS, n - slot), panels[panel], tile)


@compiled(nogil=True)
def pool_window_attention(
    keys, n_candidates, queries, group_size, n_queries, head_dim, scale, kernel_size, known, room, scores
):
    """Write the window's mean attention to the candidates of every KV head, pooled over their neighbours.

    Parameters
    ----------
    keys : int64 (n_kv_heads,)
        Addresses of each head's keys, float32 (n_entries, head_dim), row by row.
    n_candidates : int64 (n_kv_heads,)
        Leading entries that are judged.
    queries : int64 (n_kv_heads,)
        Addresses of the window's queries, float32 (group_size, n_queries, head_dim), row by row.
    group_size, n_queries, head_dim : int
    scale : float32
    kernel_size : int
    known : int64 (n_kv_heads,)
        Addresses of the dot products of keys and queries, float32 (n_entries, n_queries * group_size), row by
        row and by query and then member of the group; 0 where they have to be found.
    room : float32 (n,)
        ``n_panels(group_size * n_queries) * WIDTH + n_queries + 1`` numbers for each of the most candidates
        and of ``ROWS`` more.
    scores : float32 (n_kv_heads, n_most)
        Written for candidates.
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
