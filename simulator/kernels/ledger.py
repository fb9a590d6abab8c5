"""Who is retained in one layer: keys and positions per KV head, ragged. Appends and evicts, never chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from simulator.kernels.compiled import compiled
from simulator.kernels.tiles import form_of
from simulator.kernels.widening import KINDS, address_of, whole_rows, widen_blocks

NEVER = np.iinfo(np.int32).max


class _Rows(NamedTuple):
    """What is held, each head's entries in front: (n_kv_heads, capacity, width), positions without width.

    ``keys``, ``values`` and ``pairs`` are float32, of width 0 where they are not held; two neighbouring
    bfloat16 numbers of a key are one of ``pairs``. ``positions`` are int32.
    """

    keys: np.ndarray
    values: np.ndarray
    pairs: np.ndarray
    positions: np.ndarray


class Ledger:
    """Retained entries of one layer.

    Parameters
    ----------
    n_kv_heads, head_dim, total_tokens : int
    dtype : str
        What keys and values are stored in.
    with_values : bool
        Whether values are held too.

    Attributes
    ----------
    lengths : int64 (n_kv_heads,)
        Entries each KV head holds.
    evicted_at : int32 (n_kv_heads, total_tokens)
        Token count at which each position was evicted, ``NEVER`` if it was not.
    """

    def __init__(
        self,
        n_kv_heads: int,
        head_dim: int,
        total_tokens: int,
        dtype: str,
        *,
        with_values: bool = False,
    ) -> None:
        # Pairs are copied as if they were float32.
        self._kinds = np.array([KINDS[dtype], KINDS[dtype], KINDS["float32"]])
        self.lengths = np.zeros(n_kv_heads, np.int64)
        self.evicted_at = np.full((n_kv_heads, total_tokens), NEVER, np.int32)
        form = form_of(dtype, head_dim)
        widths = head_dim, head_dim if with_values else 0, form.depth if form.paired else 0
        keys, values, pairs = (np.empty((n_kv_heads, 0, width), np.float32) for width in widths)
        self._hold(_Rows(keys, values, pairs, np.empty((n_kv_heads, 0), np.int32)))

    @property
    def n_entries(self) -> int:
        """Entries held by all heads together."""
        return int(self.lengths.sum())

    @property
    def multiplied(self) -> np.ndarray:
        """Keys of all heads as ``simulator.kernels.spans.span_mass`` wants them."""
        return self._rows.pairs if self._rows.pairs.shape[2] else self._rows.keys

    def keys(self) -> list[np.ndarray]:
        """Give each head's keys in slot order, float32 (n_entries, head_dim), read-only and not a copy."""
        return self._held(self._shown.keys)

    def positions(self) -> list[np.ndarray]:
        """Give each head's token positions in slot order, int32 (n_entries,), as ``keys``."""
        return self._held(self._shown.positions)

    def values(self) -> list[np.ndarray]:
        """Give each head's values, of width 0 if none are stored; as ``keys``."""
        return self._held(self._shown.values)

    def append(self, first: int, keys: np.ndarray, values: np.ndarray | None = None) -> None:
        """Add the entries of positions ``first`` onwards.

        ``keys`` and ``values`` are (n_kv_heads, n_tokens, head_dim) as stored in ``dtype``.
        """
        capacity, room = int(self.lengths.max()) + keys.shape[1], self._rows.positions.shape[1]
        if capacity > room:
            self._lengthen(max(capacity, room + room // 2))
        keys = whole_rows(keys)
        # Without values nothing is read of them: their rows have no width.
        stored = keys, keys if values is None else whole_rows(values), keys
        addresses = np.array([address_of(own) for own in stored])
        strides = np.array([own.strides[:2] for own in stored])
        append_entries(addresses, strides, self._kinds, keys.shape[1], first, *self._rows, self.lengths)

    def retain(self, slots: Sequence[np.ndarray | None], n_tokens: int) -> None:
        """Keep the entries at each head's ``slots``, in that order, and evict the others at ``n_tokens``.

        ``slots`` are int64 (n_kept,), or None where everybody stays.
        """
        counts = np.array([-1 if own is None else len(own) for own in slots])
        kept = [own for own in slots if own is not None]
        if kept:
            retain_entries(np.concatenate(kept), counts, n_tokens, *self._rows, self.lengths, self.evicted_at)

    def release(self) -> None:
        """Let go of keys, values and positions; ``lengths`` and ``evicted_at`` stay."""
        self._hold(_Rows(*(own[:, :0].copy() for own in self._rows)))

    def _lengthen(self, capacity: int) -> None:
        # Only what is held: room that a short head never used takes no memory.
        longer = _Rows(*(np.empty((len(own), capacity, *own.shape[2:]), own.dtype) for own in self._rows))
        for new, own in zip(longer, self._rows, strict=True):
            for kv_head, length in enumerate(self.lengths):
                new[kv_head, :length] = own[kv_head, :length]
        self._hold(longer)

    def _hold(self, rows: _Rows) -> None:
        self._rows, self._shown = rows, _Rows(*(own.view() for own in rows))
        for own in self._shown:
            own.flags.writeable = False

    def _held(self, rows: np.ndarray) -> list[np.ndarray]:
        return [own[:length] for own, length in zip(rows, self.lengths, strict=True)]


# For so few numbers the interpreter is kept: to hand it to another thread and wait for it takes longer.
@compiled()
def append_entries(stored, strides, kinds, n_rows, first, keys, values, pairs, positions, lengths):
    """Write the entries of ``n_rows`` tokens, from position ``first`` on, behind those that each head holds.

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
    """Do what ``Ledger.retain`` does.

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
