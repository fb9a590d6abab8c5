"""The entries of all KV heads of a layer, added and evicted in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from simulator.kernels.compiled import compiled
from simulator.kernels.tiles import form_of
from simulator.kernels.widening import KINDS, address_of, whole_rows, widen_blocks


class Rows(NamedTuple):
    """What is held, each head's entries in front: (n_kv_heads, capacity, width), positions without width.

    Attributes
    ----------
    keys, values, pairs : float32 (n_kv_heads, capacity, width)
        Width 0 where they are not held. Two neighbouring bfloat16 numbers of a key are one of ``pairs``.
    positions : int32 (n_kv_heads, capacity)
    """

    keys: np.ndarray
    values: np.ndarray
    pairs: np.ndarray
    positions: np.ndarray

    @property
    def multiplied(self) -> np.ndarray:
        """Keys as ``simulator.kernels.spans.span_mass`` multiplies them."""
        return self.pairs if self.pairs.shape[2] else self.keys

    def longer(self, capacity: int, lengths: np.ndarray) -> Rows:
        """Give the same entries in arrays of another capacity."""
        # Only what is held: room that a short head never used takes no memory.
        longer = Rows(*[np.empty((len(own), capacity, *own.shape[2:]), own.dtype) for own in self])
        for new, own in zip(longer, self, strict=True):
            for kv_head, length in enumerate(lengths):
                new[kv_head, :length] = own[kv_head, :length]
        return longer


def no_rows(n_kv_heads: int, head_dim: int, dtype: str, *, with_values: bool) -> Rows:
    """Give arrays without capacity, for entries whose numbers are stored in ``dtype``."""
    form = form_of(dtype, head_dim)
    widths = head_dim, head_dim if with_values else 0, form.depth if form.paired else 0
    keys, values, pairs = (np.empty((n_kv_heads, 0, width), np.float32) for width in widths)
    return Rows(keys, values, pairs, np.empty((n_kv_heads, 0), np.int32))


def append(
    rows: Rows, lengths: np.ndarray, first: int, keys: np.ndarray, values: np.ndarray | None, dtype: str
) -> None:
    """Write the entries of tokens from position ``first`` on behind those that each head holds.

    Parameters
    ----------
    rows : Rows
        With room for them.
    lengths : int64 (n_kv_heads,)
        Entries that each KV head holds; updated.
    first : int
    keys, values : (n_kv_heads, n_tokens, head_dim)
        As stored in ``dtype``.
    dtype : str
    """
    keys = whole_rows(keys)
    # Without values nothing is read of them: their rows have no width.
    stored = keys, keys if values is None else whole_rows(values), keys
    append_entries(
        np.array([address_of(own) for own in stored]),
        np.array([own.strides[:2] for own in stored]),
        # Pairs are copied as if they were float32.
        np.array([KINDS[dtype], KINDS[dtype], KINDS["float32"]]),
        keys.shape[1],
        first,
        *rows,
        lengths,
    )


def retain(
    rows: Rows,
    lengths: np.ndarray,
    slots: Sequence[np.ndarray | None],
    n_tokens: int,
    evicted_at: np.ndarray,
) -> None:
    """Keep the entries at each head's ``slots``, in that order, and evict the others at ``n_tokens``.

    Parameters
    ----------
    rows : Rows
    lengths : int64 (n_kv_heads,)
        Entries that each KV head holds; updated.
    slots : sequence of int64 (n_kept,), or None where everybody stays
    n_tokens : int
    evicted_at : int32 (n_kv_heads, total_tokens)
        Written at the positions of those evicted.
    """
    counts = np.array([-1 if own is None else len(own) for own in slots])
    kept = [own for own in slots if own is not None]
    if kept:
        retain_entries(np.concatenate(kept), counts, n_tokens, *rows, lengths, evicted_at)


# For so few numbers the interpreter is kept: to hand it to another thread and wait for it takes longer.
@compiled()
def append_entries(stored, strides, kinds, n_rows, first, keys, values, pairs, positions, lengths):
    """Do what ``append`` does with ``n_rows`` tokens.

    ``stored``, int64 (3,), are addresses of what becomes ``keys``, ``values`` and ``pairs``; ``strides``,
    int64 (3, 2), and ``kinds``, int64 (3,), are as of ``widen_blocks``. Of those without width nothing is
    read.
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
    """Do what ``retain`` does.

    ``slots``, int64 (n,), are those of one head after the other; ``counts``, int64 (n_kv_heads,), says how
    many belong to each, -1 where everybody stays.
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
