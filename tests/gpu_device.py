"""Where tests of the GPU code run, and pools of ragged segments for them."""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when triton is imported: kernels then run in Python, on arrays of the host.
    os.environ["TRITON_INTERPRET"] = "1"


def ragged_pool(rng, lengths, head_dim, dtype, room=3):
    """Lay segments in shuffled places with gaps between them; NaN wherever nothing is held.

    Gives keys and values (capacity, head_dim), positions int32 (capacity,), increasing within a segment and
    -1 in gaps, starts int64 and lengths int32 (n_segments,), all on ``DEVICE``.
    """
    starts, at = [0] * len(lengths), int(rng.integers(1, room + 1))
    for segment in rng.permutation(len(lengths)):
        starts[segment] = at
        at += lengths[segment] + int(rng.integers(1, room + 1))
    keys, values = torch.full((at, head_dim), torch.nan), torch.full((at, head_dim), torch.nan)
    positions = torch.full((at,), -1, dtype=torch.int32)
    for start, length in zip(starts, lengths, strict=True):
        slots = slice(start, start + length)
        keys[slots] = torch.from_numpy(rng.normal(size=(length, head_dim)))
        values[slots] = torch.from_numpy(rng.normal(size=(length, head_dim)))
        positions[slots] = torch.from_numpy(rng.integers(1, 4, size=length).cumsum())
    held = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int32)
    pool = (keys.to(dtype), values.to(dtype), positions, *held)
    return tuple(tensor.to(DEVICE) for tensor in pool)
