"""Who is retained in one layer: keys and positions per KV head, ragged. Appends and evicts, never chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simulator.kernels.entries import append_entries, retain_entries
from simulator.kernels.tiles import form_of
from simulator.kernels.widening import KINDS, address_of, whole_rows

NEVER = np.iinfo(np.int32).max


class _Rows(NamedTuple):
    """What is held: (n_kv_heads, capacity, width), of ``keys`` also in ``pairs``; positions without width."""

    keys: np.ndarray
    values: np.ndarray
    pairs: np.ndarray
    positions: np.ndarray


class Ledger:
    """Retained entries of one layer.

    Attributes
    ----------
    lengths : int64 (n_kv_heads,)
        Entries each KV head holds.
    evicted_at : int32 (n_kv_heads, total_tokens)
        Token count at which each position was evicted, ``NEVER`` if it was not.
    form : Form
        How its keys enter products.
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
        self.form = form_of(dtype, head_dim)
        self._kinds = np.array([KINDS[dtype], KINDS[dtype], self.form.kind])
        self.lengths = np.zeros(n_kv_heads, np.int64)
        self.evicted_at = np.full((n_kv_heads, total_tokens), NEVER, np.int32)
        widths = head_dim, head_dim if with_values else 0, self.form.depth if self.form.paired else 0
        keys, values, pairs = (np.empty((n_kv_heads, 0, width), np.float32) for width in widths)
        self._hold(_Rows(keys, values, pairs, np.empty((n_kv_heads, 0), np.int32)))

    @property
    def n_entries(self) -> int:
        """Entries held by all heads together."""
        return int(self.lengths.sum())

    @property
    def key_addresses(self) -> np.ndarray:
        """Addresses of each head's keys in ``form``, int64 (n_kv_heads,), until ``append`` or ``release``."""
        rows = self._rows.pairs if self.form.paired else self._rows.keys
        return address_of(rows) + rows.strides[0] * np.arange(len(self.lengths))

    def keys(self, kv_head: int) -> np.ndarray:
        """Give one head's keys in slot order, float32 (n_entries, head_dim), read-only and without a copy."""
        return self._shown.keys[kv_head, : self.lengths[kv_head]]

    def positions(self, kv_head: int) -> np.ndarray:
        """Give one head's token positions in slot order, int32 (n_entries,), as ``keys``."""
        return self._shown.positions[kv_head, : self.lengths[kv_head]]

    def values(self, kv_head: int) -> np.ndarray:
        """Give one head's values, of width 0 if none are stored; as ``keys``."""
        return self._shown.values[kv_head, : self.lengths[kv_head]]

    def append(self, first: int, keys: np.ndarray, values: np.ndarray | None = None) -> None:
        """Add the entries of positions ``first`` onwards.

        ``keys`` and ``values`` are (n_kv_heads, n_tokens, head_dim) as stored in ``dtype``.
        """
        n_tokens = keys.shape[1]
        self._reserve(int(self.lengths.max()) + n_tokens)
        keys = whole_rows(keys)
        # Without values nothing is read of them: their rows have no width.
        stored = keys, keys if values is None else whole_rows(values), keys
        append_entries(
            np.array([address_of(own) for own in stored]),
            np.array([own.strides[:2] for own in stored]),
            self._kinds,
            n_tokens,
            first,
            *self._rows,
            self.lengths,
        )

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

    def _reserve(self, capacity: int) -> None:
        held = self._rows.positions.shape[1]
        if capacity > held:
            grown = max(capacity, held + held // 2)
            self._hold(_Rows(*(_longer(own, grown, self.lengths) for own in self._rows)))

    def _hold(self, rows: _Rows) -> None:
        self._rows, self._shown = rows, _Rows(*(own.view() for own in rows))
        for own in self._shown:
            own.flags.writeable = False


def _longer(rows: np.ndarray, capacity: int, lengths: np.ndarray) -> np.ndarray:
    longer = np.empty((rows.shape[0], capacity, *rows.shape[2:]), rows.dtype)
    # Only what is held: room that a short head never used takes no memory.
    for own, held, length in zip(longer, rows, lengths, strict=True):
        own[:length] = held[:length]
    return longer
