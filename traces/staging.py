"""Parts of a trace while it is recorded: token by token on disk, read back head by head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Heads are gathered in groups of this many bytes: few passes over a part, little memory.
GROUP_BYTES = 32 * 2**20
BLOCK_BYTES = 4 * 2**20


class Part:
    """One array of one layer, appended along tokens.

    A recording delivers tokens, a replay reads heads. The file holds the array token-major,
    (n_tokens, n_heads, ...), because only so can it grow at its end.

    Parameters
    ----------
    path : Path
        The file to append to.
    dtype : np.dtype
        Type of the stored numbers.
    row_shape : tuple of int
        Shape of one token: (n_heads,) or (n_heads, head_dim).
    """

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self.path = path
        self.dtype = dtype
        self.row_shape = row_shape

    def append(self, array: np.ndarray) -> None:
        """Append tokens given head-major, (n_heads, n, ...)."""
        rows = np.ascontiguousarray(array.swapaxes(0, 1), dtype=self.dtype)
        with self.path.open("ab") as file:
            file.write(rows.reshape(-1).view(np.uint8).data)

    def by_head(self, n_tokens: int) -> Iterator[np.ndarray]:
        """Yield the array head-major in groups of heads, each (n_group, n_tokens, ...).

        A group is valid until the next is asked for: they share their memory.

        Raises
        ------
        OSError
            If the file holds less than was appended.
        """
        n_heads, *rest = self.row_shape
        row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        n_group = min(n_heads, max(1, GROUP_BYTES * n_heads // (row_bytes * n_tokens)))
        n_block = min(n_tokens, max(1, BLOCK_BYTES // row_bytes))
        block = np.empty((n_block, *self.row_shape), self.dtype)
        groups = np.empty((n_group, n_tokens, *rest), self.dtype)
        for first in range(0, n_heads, n_group):
            group = groups[: min(n_group, n_heads - first)]
            with self.path.open("rb") as file:
                for start in range(0, n_tokens, n_block):
                    rows = block[: min(n_block, n_tokens - start)]
                    if file.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:
                        raise OSError(f"{self.path}: shorter than the {n_tokens} tokens appended")
                    heads = rows[:, first : first + len(group)]
                    group[:, start : start + len(rows)] = heads.swapaxes(0, 1)
            yield group

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
