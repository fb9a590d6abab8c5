"""Where GPU kernels are tested, and a ragged pool to test them on; import it before triton."""

from __future__ import annotations

import os

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def ragged_pool(rng, lengths, head_dim, dtype, room=3, *, shuffled=False):
    """Lay segments out with ``room`` free slots before each and after the last; those hold no numbers.

    Gives keys, values, positions, starts and lengths on ``DEVICE``; segments by number, or shuffled.
    """
    lengths = np.asarray(lengths, np.int64)
    order = rng.permutation(len(lengths)) if shuffled else np.arange(len(lengths))
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths[order] + room) - lengths[order]
    held = np.zeros(int((lengths + room).sum()) + room, bool)
    positions = np.full(len(held), -7, np.int32)
    for start, n in zip(starts, lengths, strict=True):
        held[start : start + n] = True
        positions[start : start + n] = np.cumsum(rng.integers(1, 4, n)) - 1
    keys, values = np.where(held[:, None], rng.normal(size=(2, len(held), head_dim)), np.nan)
    arrays = positions, starts.astype(np.int64), lengths.astype(np.int32)
    pool = (torch.from_numpy(entries).to(DEVICE, dtype) for entries in (keys, values))
    return *pool, *(torch.from_numpy(array).to(DEVICE) for array in arrays)
