"""What a window attends to: kernels and twins against the simulator."""

from __future__ import annotations

import pytest
from scored_pools import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LENGTHS,
    WINDOW,
    asked,
    assert_matches,
    both,
    expected_importance,
    output,
    shuffled_pool,
    types,
)


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ("group_size", "n_queries", "head_dim", "dtype"),
    [
        (1, 8, 16, FLOAT32),
        (2, 1, 64, FLOAT32),
        (3, 20, 16, FLOAT16),
        (4, 8, 128, FLOAT32),
        (4, 8, 128, FLOAT16),
        (4, 8, 128, BFLOAT16),
        (7, 5, 64, BFLOAT16),
        (8, 33, 32, FLOAT16),
        (8, 64, 16, FLOAT32),
    ],
)
def test_importance_is_the_simulators(code, group_size, n_queries, head_dim, dtype, rng):
    lengths = LENGTHS if head_dim == 16 else [0, 73, 9, 8, 150]
    pool = shuffled_pool(rng, lengths, head_dim, dtype)
    keys, _, _, starts, lengths = pool
    queries = asked(rng, keys, len(lengths), group_size, n_queries)
    scale, found = head_dim**-0.5, output(keys)
    longest = int(lengths.max())
    code.window_importance(queries, keys, starts, lengths, found, scale=scale, window=WINDOW, longest=longest)
    assert_matches(found, expected_importance(pool, queries, scale), rtol=1e-5)


@both
@types
def test_large_logits_do_not_overflow(code, dtype, rng):
    pool = shuffled_pool(rng, [40, 200], 64, dtype)
    keys, _, _, starts, lengths = pool
    queries = asked(rng, keys, 2, 4, WINDOW, size=25.0)
    found = output(keys)
    code.window_importance(queries, keys, starts, lengths, found, scale=0.25, window=WINDOW, longest=200)
    largest = (queries[1, 0] @ keys[starts[1] : starts[1] + 200].T).abs().max() * 0.25
    assert largest > 100
    # A logit of 100 is known to 1e-4 where tensor cores cut off what they add, and so is its weight.
    assert_matches(found, expected_importance(pool, queries, 0.25), rtol=3e-4, atol=1e-9)


@both
@pytest.mark.parametrize("window", [1, 5, 40])
def test_importance_leaves_out_any_window(code, window, rng):
    pool = shuffled_pool(rng, [41, 40, 130, 6, 1], 16, FLOAT32)
    keys, _, _, starts, lengths = pool
    queries, found = asked(rng, keys, 5, 2, 3), output(keys)
    code.window_importance(queries, keys, starts, lengths, found, scale=0.3, window=window, longest=130)
    assert_matches(found, expected_importance(pool, queries, 0.3, window), rtol=1e-5)
