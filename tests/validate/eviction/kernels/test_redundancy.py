"""Which keys repeat others: kernels and twins against the simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from scored_pools import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LENGTHS,
    Kernels,
    assert_matches,
    both,
    expected_redundancy,
    output,
    plant_duplicates,
    shuffled_pool,
    types,
)


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ("head_dim", "threshold", "dtype"),
    [
        (16, 0.5, FLOAT32),
        (16, 0.8, FLOAT16),
        (16, 0.5, BFLOAT16),
        (32, 0.7, FLOAT32),
        (64, 0.3, FLOAT16),
        (128, 0.5, FLOAT32),
        (128, 0.5, BFLOAT16),
    ],
)
def test_redundancy_is_the_simulators(code, head_dim, threshold, dtype, rng):
    lengths = LENGTHS if head_dim == 16 else [0, 73, 9, 150]
    pool = shuffled_pool(rng, lengths, head_dim, dtype)
    keys, _, _, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    found = output(keys)
    code.redundancy(keys, starts, lengths, found, threshold=threshold, longest=int(lengths.max()))
    expected = list(expected_redundancy(pool, threshold))
    assert_matches(found, expected, rtol=1e-6, atol=1e-9)
    # Duplicates count: without any, shares are others.
    without = list(expected_redundancy(pool, 1.1))
    assert max(np.abs(a - b).max() for (_, a), (_, b) in zip(expected, without, strict=True)) > 1e-5


@both
def test_every_key_but_opposites_is_a_duplicate_above_minus_one(code, rng):
    pool = shuffled_pool(rng, [5, 140, 2, 1], 16, FLOAT32)
    keys, _, _, starts, lengths = pool
    found = output(keys)
    code.redundancy(keys, starts, lengths, found, threshold=-1.0, longest=140)
    assert_matches(found, expected_redundancy(pool, -1.0), rtol=1e-6, atol=1e-9)


@both
@types
def test_a_cosine_at_the_threshold_is_no_duplicate(code, dtype, rng):
    keys, _, _, starts, lengths = pool = shuffled_pool(rng, [3], 16, dtype)
    # Both norms are powers of two: the cosine of the first two is 1/2 and no rounding moves it.
    keys[starts[0] : starts[0] + 3] = 0
    keys[starts[0], :4] = 1
    keys[starts[0] + 1, 0] = 1
    keys[starts[0] + 2, 5] = 1
    found = {}
    for threshold in (0.5, 0.4999):
        found[threshold] = output(keys)
        code.redundancy(keys, starts, lengths, found[threshold], threshold=threshold, longest=3)
        assert_matches(found[threshold], expected_redundancy(pool, threshold), rtol=1e-6)
    similar = torch.tensor([0.5, 0.5, 0.0], device=DEVICE) / 3
    slots = slice(int(starts[0]), int(starts[0]) + 3)
    torch.testing.assert_close(found[0.5][slots], similar.softmax(0), rtol=1e-6, atol=0)
    equal = torch.full((3,), 1 / 3, device=DEVICE)
    torch.testing.assert_close(found[0.4999][slots], equal, rtol=1e-6, atol=0)


def test_kernels_compare_wide_float32_keys_piece_by_piece(rng):
    # Two keys that differ in the last dimensions only: whoever leaves those out takes them for duplicates.
    keys, _, _, starts, lengths = pool = shuffled_pool(rng, [2, 70], 128, FLOAT32)
    first = int(starts[0])
    keys[first : first + 2] = 0
    keys[first : first + 2, 3] = 1
    keys[first, 127], keys[first + 1, 127] = 2, -2
    found = output(keys)
    Kernels.redundancy(keys, starts, lengths, found, threshold=0.5, longest=70)
    assert_matches(found, expected_redundancy(pool, 0.5), rtol=1e-6)
