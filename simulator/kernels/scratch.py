"""Memory for the products of one block, one array per thread, so that no block has to ask for it anew."""

from __future__ import annotations

import threading

import numpy as np


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.kept = np.empty(0, np.float32)


_scratch = _Scratch()


def scratch(n_rows: int, n_columns: int) -> np.ndarray:
    """Give an array of any content, float32 (n_rows, n_columns), valid until the thread's next call."""
    size = n_rows * n_columns
    if size > len(_scratch.kept):
        _scratch.kept = np.empty(size + size // 4, np.float32)
    return _scratch.kept[:size].reshape(n_rows, n_columns)
