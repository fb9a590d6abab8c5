"""Memory of one layer: all sequences' entries in one block, without gaps beyond the buffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class LayerPool:
    """Keys, values and positions of one layer, ragged over sequences and KV heads.

    Every sequence owns one stretch of the block and its KV heads share it: each has its entries, then room
    for the same number of tokens. What one head gives up, another can use.

    Parameters
    ----------
    n_rows, n_kv_heads, head_dim : int
    dtype : torch.dtype
    device : torch.device

    Attributes
    ----------
    keys, values : Tensor, shape (capacity, head_dim)
    positions : int32 (capacity,)
    starts, lengths : int64 (n_rows, n_kv_heads)
        Where each KV head's entries begin, and how many there are.
    room : int64 (n_rows,)
        Tokens that each row can still take.
    """

    def __init__(
        self, n_rows: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty(0, head_dim, dtype=dtype, device=device)
        self.values = torch.empty(0, head_dim, dtype=dtype, device=device)
        self.positions = np.empty(0, np.int32)
        self.starts = np.zeros((n_rows, n_kv_heads), np.int64)
        self.lengths = np.zeros((n_rows, n_kv_heads), np.int64)
        self.room = np.zeros(n_rows, np.int64)
        self._stretches = np.zeros(n_rows, np.int64)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the block: keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def segment(self, row: int, kv_head: int) -> slice:
        """Give the slots that one KV head's entries occupy."""
        start = int(self.starts[row, kv_head])
        return slice(start, start + int(self.lengths[row, kv_head]))

    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        held: Sequence[Sequence[np.ndarray]],
        padding: np.ndarray,
        room: np.ndarray,
    ) -> None:
        """Take in what the sequences hold after their prompts; the pool is empty before.

        Parameters
        ----------
        keys, values : Tensor, shape (n_rows, n_kv_heads, length, head_dim)
        held : per row, per KV head, int array (n_entries,)
            Positions to keep, in slot order.
        padding : int64 (n_rows,)
            Column of each row's first token.
        room : int64 (n_rows,)
        """
        self.lengths = np.array([[len(own) for own in heads] for heads in held], np.int64)
        self._lay_out(room)
        _, n_kv_heads, length, width = keys.shape
        self.keys = self.keys.new_zeros(self._stretches.sum(), width)
        self.values = torch.zeros_like(self.keys)
        self.positions = np.zeros(len(self.keys), np.int32)
        source = []
        for row, heads in enumerate(held):
            for kv_head, own in enumerate(heads):
                source.append((row * n_kv_heads + kv_head) * length + padding[row] + own)
                self.positions[self.segment(row, kv_head)] = own
        target = _ranges(self.starts, self.lengths)
        self._copy(keys.reshape(-1, width), values.reshape(-1, width), np.concatenate(source), target)

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray) -> None:
        """Add one or more tokens per row; every row has room.

        Parameters
        ----------
        keys, values : Tensor, shape (n_rows, n_kv_heads, n_new, head_dim)
        positions : int (n_rows,)
            Of each row's first new token.
        """
        new = np.arange(keys.shape[2])
        slots = (self.starts + self.lengths)[..., None] + new
        index = torch.from_numpy(slots.reshape(-1)).to(self.keys.device)
        self.keys[index] = keys.reshape(-1, keys.shape[-1])
        self.values[index] = values.reshape(-1, values.shape[-1])
        self.positions[slots] = (positions[:, None] + new)[:, None]
        self.lengths += len(new)
        self.room -= len(new)

    def retain(self, row: int, survivors: Sequence[np.ndarray | None], room: int) -> None:
        """Keep of one row only the given slots, in their order (all where None), and make room for tokens."""
        before = zip(self.lengths[row], survivors, strict=True)
        own = [np.arange(length) if slots is None else slots for length, slots in before]
        kept = np.array([len(slots) for slots in own])
        source = np.concatenate(own) + np.repeat(self.starts[row], kept)
        stretch = int(self._stretches[row])
        needed = int(kept.sum() + len(kept) * room)
        # Until the block has grown, what was left of the stretch is all the room there is.
        self.room[row] = room if needed <= stretch else (stretch - kept.sum()) // len(kept)
        first = self.starts[row, 0]
        self.lengths[row] = kept
        self.starts[row, 1:] = first + np.cumsum(kept[:-1] + self.room[row])
        target = _ranges(self.starts[row], kept)
        self.positions[target] = self.positions[source]
        self._copy(self.keys, self.values, source, target)
        # Half empty is too large: a prompt that waited for its first compression is gone for good.
        if not needed <= stretch <= 2 * needed:
            wanted = self.room.copy()
            wanted[row] = room
            self.make_room(wanted)

    def make_room(self, room: np.ndarray) -> None:
        """Lay the block out anew so that each row has room for at least so many tokens."""
        self._rebuild(np.arange(len(self.room)), np.maximum(room, self.room))

    def keep_rows(self, rows: np.ndarray) -> None:
        """Free the memory of all other rows."""
        self._rebuild(rows, self.room[rows])

    def _rebuild(self, rows: np.ndarray, room: np.ndarray) -> None:
        source = _ranges(self.starts[rows], self.lengths[rows])
        self.lengths = self.lengths[rows]
        self._lay_out(room)
        target = _ranges(self.starts, self.lengths)
        old_keys, old_values, old_positions = self.keys, self.values, self.positions
        self.keys = old_keys.new_zeros(self._stretches.sum(), old_keys.shape[1])
        self.values = torch.zeros_like(self.keys)
        self.positions = np.zeros(len(self.keys), np.int32)
        self.positions[target] = old_positions[source]
        self._copy(old_keys, old_values, source, target)

    def _lay_out(self, room: np.ndarray) -> None:
        sizes = self.lengths + room[:, None]
        self.room, self._stretches = room.astype(np.int64), sizes.sum(1)
        self.starts = (np.cumsum(sizes) - sizes.reshape(-1)).reshape(sizes.shape)

    def _copy(self, keys: torch.Tensor, values: torch.Tensor, source: np.ndarray, target: np.ndarray) -> None:
        # Source and target may overlap: indexing makes a copy first.
        source_index = torch.from_numpy(source).to(keys.device)
        target_index = torch.from_numpy(target).to(keys.device)
        self.keys[target_index] = keys[source_index]
        self.values[target_index] = values[source_index]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join the ranges that begin at ``starts`` and hold ``lengths`` numbers; int64."""
    starts, lengths = starts.reshape(-1), lengths.reshape(-1)
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
