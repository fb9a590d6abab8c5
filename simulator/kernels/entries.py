"""Compiled loops that add and evict entries in all KV heads of a layer: arrays in, arrays changed."""

from __future__ import annotations

import numpy as np
from numba import njit

from simulator.kernels.compiled import compiled
from simulator.kernels.widening import widen_blocks


# For so few numbers the interpreter is kept: to hand it to another thread and wait for it takes longer.
@compiled()
def append_entries(stored, strides, kinds, n_rows, first, keys, values, pairs, positions, lengths):
    """Write the entries of ``n_rows`` tokens, from position ``first`` on, behind those that each head holds.

    Parameters
    ----------
    stored : int64 (3,)
        Addresses of what is stored for ``keys``, ``values`` and ``pairs``, of which nothing is read for those
        without width; otherwise with ``strides``, int64 (3, 2), and ``kinds``, int64 (3,), as of
        ``simulator.kernels.widening.widen_blocks``.
    n_rows, first : int
    keys, values, pairs : float32 (n_kv_heads, capacity, width)
    positions : int32 (n_kv_heads, capacity)
    lengths : int64 (n_kv_heads,)
        These five are updated.
    """
    for i, rows in enumerate((keys, values, pairs)):
        if rows.shape[2]:
            widen_blocks(stored[i], strides[i], kinds[i], n_rows, lengths, rows)
    for kv_head in range(lengths.shape[0]):
        for i in range(n_rows):
            positions[kv_head, lengths[kv_head] + i] = first + i
        lengths[kv_head] += n_rows


@compiled(nogil=True)
def retain_entries(slots, counts, n_tokens, keys, values, pairs, positions, lengths, evicted_at):
    """Keep some entries of each head, in a given order, and evict the others.

    Parameters
    ----------
    slots : int64 (n,)
        Those that stay, of one head after the other.
    counts : int64 (n_kv_heads,)
        How many of them belong to each head; -1 where everybody stays.
    n_tokens : int
        When the others are evicted.
    keys, values, pairs : float32 (n_kv_heads, capacity, width)
    positions : int32 (n_kv_heads, capacity)
    lengths : int64 (n_kv_heads,)
        These five are updated.
    evicted_at : int32 (n_kv_heads, total_tokens)
        Updated.
    """
    start = 0
    for kv_head in range(counts.shape[0]):
        count = counts[kv_head]
        if count < 0:
            continue
        own = slots[start : start + count]
        start += count
        is_kept = np.zeros(lengths[kv_head], np.bool_)
        rises = True
        for i in range(count):
            is_kept[own[i]] = True
            rises &= i == 0 or own[i] > own[max(i, 1) - 1]
        for slot in range(lengths[kv_head]):
            if not is_kept[slot]:
                evicted_at[kv_head, positions[kv_head, slot]] = n_tokens
        if rises:
            _close_up(keys, kv_head, own)
            _close_up(values, kv_head, own)
            _close_up(pairs, kv_head, own)
        else:
            _rearrange(keys, kv_head, own)
            _rearrange(values, kv_head, own)
            _rearrange(pairs, kv_head, own)
        before = positions[kv_head].copy()
        for i in range(count):
            positions[kv_head, i] = before[own[i]]
        lengths[kv_head] = count


@njit(inline="always")
def _close_up(rows, kv_head, slots):
    """Move the rows at ``slots``, which increase, to the front."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot != i:
            for d in range(rows.shape[2]):
                rows[kv_head, i, d] = rows[kv_head, slot, d]


@njit(inline="always")
def _rearrange(rows, kv_head, slots):
    """Move the rows at ``slots``, in whatever order, to the front."""
    before = rows[kv_head].copy()
    for i in range(slots.shape[0]):
        for d in range(rows.shape[2]):
            rows[kv_head, i, d] = before[slots[i], d]
