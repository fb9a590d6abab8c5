"""Who is retained in one layer: keys and positions per KV head, ragged. Appends and evicts, never chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.kernels.entries import Rows, append, no_rows, retain

NEVER = np.iinfo(np.int32).max


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
        self._dtype = dtype
        self.lengths = np.zeros(n_kv_heads, np.int64)
        self.evicted_at = np.full((n_kv_heads, total_tokens), NEVER, np.int32)
        self._hold(no_rows(n_kv_heads, head_dim, dtype, with_values=with_values))

    @property
    def n_entries(self) -> int:
        """Entries held by all heads together."""
        return int(self.lengths.sum())

    @property
    def multiplied(self) -> np.ndarray:
        """Keys of all heads as ``simulator.kernels.spans.span_mass`` wants them."""
        return self._rows.multiplied

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
            self._hold(self._rows.longer(max(capacity, room + room // 2), self.lengths))
        append(self._rows, self.lengths, first, keys, values, self._dtype)

    def retain(self, slots: Sequence[np.ndarray | None], n_tokens: int) -> None:
        """Keep the entries at each head's ``slots``, in that order, and evict the others at ``n_tokens``.

        ``slots`` are int64 (n_kept,), or None where everybody stays.
        """
        retain(self._rows, self.lengths, slots, n_tokens, self.evicted_at)

    def release(self) -> None:
        """Let go of keys, values and positions; ``lengths`` and ``evicted_at`` stay."""
        self._hold(Rows(*(own[:, :0].copy() for own in self._rows)))

    def _hold(self, rows: Rows) -> None:
        self._rows, self._shown = rows, Rows(*(own.view() for own in rows))
        for own in self._shown:
            own.flags.writeable = False

    def _held(self, rows: np.ndarray) -> list[np.ndarray]:
        return [own[:length] for own, length in zip(rows, self.lengths, strict=True)]
