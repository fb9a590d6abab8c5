"""Who is retained in one layer: keys and positions per KV head, ragged. Appends and evicts, never chooses."""

from __future__ import annotations

import numpy as np

from simulator.kernels import close_up, increases

NEVER = np.iinfo(np.int32).max


class Ledger:
    """Retained entries of one layer.

    Attributes
    ----------
    lengths : int64 (n_kv_heads,)
        Entries each KV head holds.
    evicted_at : int32 (n_kv_heads, total_tokens)
        Token count at which each position was evicted, ``NEVER`` if it was not.
    """

    def __init__(
        self, n_kv_heads: int, head_dim: int, total_tokens: int, *, with_values: bool = False
    ) -> None:
        self.lengths = np.zeros(n_kv_heads, np.int64)
        self.evicted_at = np.full((n_kv_heads, total_tokens), NEVER, np.int32)
        self._keys = [np.empty((0, head_dim), np.float32) for _ in range(n_kv_heads)]
        width = head_dim if with_values else 0
        self._values = [np.empty((0, width), np.float32) for _ in range(n_kv_heads)]
        self._positions = [np.empty(0, np.int32) for _ in range(n_kv_heads)]

    @property
    def n_entries(self) -> int:
        """Entries held by all heads together."""
        return int(self.lengths.sum())

    def keys(self, kv_head: int) -> np.ndarray:
        """Give one head's keys in slot order, float32 (n_entries, head_dim), without a copy."""
        return self._keys[kv_head][: self.lengths[kv_head]]

    def positions(self, kv_head: int) -> np.ndarray:
        """Give one head's token positions in slot order, int32 (n_entries,), without a copy."""
        return self._positions[kv_head][: self.lengths[kv_head]]

    def values(self, kv_head: int) -> np.ndarray:
        """Give one head's values, of width 0 if none are stored; as ``keys``."""
        return self._values[kv_head][: self.lengths[kv_head]]

    def append(self, first: int, keys: np.ndarray, values: np.ndarray | None = None) -> None:
        """Add the entries of positions ``first`` onwards, float32 (n_kv_heads, n_tokens, head_dim)."""
        n_tokens = keys.shape[1]
        for kv_head, length in enumerate(self.lengths):
            self._reserve(kv_head, length + n_tokens)
            self._keys[kv_head][length : length + n_tokens] = keys[kv_head]
            if values is not None:
                self._values[kv_head][length : length + n_tokens] = values[kv_head]
            self._positions[kv_head][length : length + n_tokens] = np.arange(first, first + n_tokens)
        self.lengths += n_tokens

    def retain(self, kv_head: int, slots: np.ndarray, n_tokens: int) -> None:
        """Keep the entries at ``slots``, in that order, and evict the others at ``n_tokens`` tokens."""
        positions = self.positions(kv_head)
        evicted = np.ones(len(positions), bool)
        evicted[slots] = False
        self.evicted_at[kv_head, positions[evicted]] = n_tokens
        for rows in (self._keys[kv_head], self._values[kv_head]):
            if not rows.shape[1]:
                continue
            if increases(slots):
                close_up(rows, slots)
            else:
                rows[: len(slots)] = rows[slots]
        self._positions[kv_head][: len(slots)] = positions[slots]
        self.lengths[kv_head] = len(slots)

    def release(self) -> None:
        """Let go of keys, values and positions; ``lengths`` and ``evicted_at`` stay."""
        self._keys = [keys[:0].copy() for keys in self._keys]
        self._values = [values[:0].copy() for values in self._values]
        self._positions = [positions[:0].copy() for positions in self._positions]

    def _reserve(self, kv_head: int, capacity: int) -> None:
        held = len(self._keys[kv_head])
        if capacity <= held:
            return
        grown = max(capacity, held + held // 2)
        for arrays in (self._keys, self._values, self._positions):
            larger = np.empty((grown, *arrays[kv_head].shape[1:]), arrays[kv_head].dtype)
            larger[:held] = arrays[kv_head]
            arrays[kv_head] = larger
