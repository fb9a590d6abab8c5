"""Compiled loops against plain ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.kernels.attention import (
    increases,
    keep_best,
    max_pool,
    mean_weights,
    merge_logits,
    protect,
    take_off,
)
from simulator.kernels.duplicates import (
    LOST,
    add_similarity,
    carry_duplicates,
    find_duplicates,
    find_duplicates_again,
    invert_norms,
)
from simulator.kernels.tiles import HAS_PAIRS
from traces.numbers import round_to_storage, to_float32


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.sampled_from([1, 3, 5, 7, 31, 99]))
@MODERATE
def test_max_pool_takes_the_best_neighbour(values, kernel_size):
    half = kernel_size // 2
    expected = [max(values[max(j - half, 0) : j + half + 1]) for j in range(len(values))]
    pooled = np.empty(len(values), np.float32)
    max_pool(np.array(values, np.float32), kernel_size, pooled)
    assert pooled.tolist() == expected


def logit_rows(products, n_merged):
    """Merge columns of products a list at a time, and take off each row's largest."""
    n_queries = products.shape[1] // n_merged
    rows = [
        [max(entry[member * n_queries + query] for member in range(n_merged)) for entry in products.tolist()]
        for query in range(n_queries)
    ]
    return [[0.5 * (logit - max(row)) for logit in row] for row in rows]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
@MODERATE
def test_window_attention_is_normalised_by_row_and_merged(n_entries, n_queries, n_merged, seed):
    products = np.random.default_rng(seed).normal(size=(n_entries, n_queries * n_merged)).astype(np.float32)
    logits = np.empty((n_queries, n_entries), np.float32)
    merge_logits(products, np.float32(0.5), n_merged, 1, n_queries, logits)
    by_query = (
        products.reshape(n_entries, n_merged, n_queries).transpose(0, 2, 1).reshape(n_entries, -1).copy()
    )
    again = np.empty_like(logits)
    merge_logits(by_query.copy(), np.float32(0.5), n_merged, n_merged, 1, again)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_allclose(logits, logit_rows(products, n_merged), atol=1e-6)

    means = np.empty(n_entries, np.float32)
    weights = np.exp(products.T.copy())
    shares = [[weight / sum(row) for weight in row] for row in weights.tolist()]
    expected = [
        sum(
            max(shares[member * n_queries + query][j] for member in range(n_merged))
            for query in range(n_queries)
        )
        / n_queries
        for j in range(n_entries)
    ]
    mean_weights(weights, n_merged, means)
    np.testing.assert_allclose(means, expected, rtol=2e-6)


def duplicates_of(keys, threshold):
    """Give each key's newest duplicate, -1 for none, and how far the nearest cosine is from the threshold."""
    unit = keys.astype(np.float64) / np.linalg.norm(keys.astype(np.float64), axis=1)[:, None]
    similar = unit @ unit.T
    np.fill_diagonal(similar, -2)
    newest = [max([j for j, value in enumerate(row) if value > threshold], default=-1) for row in similar]
    return newest, np.abs(similar - threshold).min()


def inverse_norms(keys):
    return (1 / np.linalg.norm(keys, axis=1)).astype(np.float32)


@given(st.integers(1, 90), st.sampled_from([-1.0, 0.0, 0.3, 0.9]), st.integers(0, 10**6))
@MODERATE
def test_duplicates_are_found_at_once_step_by_step_and_again(n_entries, threshold, seed):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n_entries, 4)).astype(np.float32)
    expected, margin = duplicates_of(keys, threshold)
    if margin < 1e-5:
        return
    inverse, limit = inverse_norms(keys), np.float32(threshold)
    for steps in ([0, n_entries], [0, *np.sort(rng.integers(0, n_entries + 1, 2)), n_entries]):
        newest = np.full(n_entries, -1, np.int32)
        for first, stop in pairwise(steps):
            find_duplicates(keys.ctypes.data, 4, False, inverse[:stop], limit, first, newest[:stop])
        assert newest.tolist() == expected
    again = np.full(n_entries, 99, np.int32)
    again[::2] = LOST
    find_duplicates_again(keys.ctypes.data, 4, False, n_entries, inverse, limit, again)
    assert again[::2].tolist() == expected[::2]
    assert (again[1::2] == 99).all()


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor multiplies no pairs of bfloat16 numbers")
def test_duplicates_are_the_same_in_pairs(rng):
    stored = round_to_storage(rng.normal(size=(150, 6)).astype(np.float32), "bfloat16")
    keys, limit = to_float32(stored, "bfloat16"), np.float32(0.5)
    inverse, found = inverse_norms(keys), []
    for at, depth, paired in ((keys.ctypes.data, 6, False), (stored.ctypes.data, 3, True)):
        newest = np.full(150, -1, np.int32)
        find_duplicates(at, depth, paired, inverse, limit, 0, newest)
        again = np.full(150, LOST, np.int32)
        find_duplicates_again(at, depth, paired, 150, inverse, limit, again)
        found += [newest, again]
    for newest in found[1:]:
        np.testing.assert_array_equal(newest, found[0])
    assert (found[0] >= 0).mean() > 0.5


def test_norms_are_inverted(rng):
    keys = rng.normal(size=(5, 70)).astype(np.float32)
    keys[2] = 0
    inverse = np.empty(5, np.float32)
    invert_norms(keys, np.float32(1e-8), inverse)
    np.testing.assert_allclose(
        inverse, 1 / (np.linalg.norm(keys.astype(np.float64), axis=1) + 1e-8), rtol=1e-6
    )


def test_what_is_known_of_entries_moves_with_them():
    before, newest_before = np.array([2, 3, 7, 9], np.int32), np.array([3, -1, 1, 0], np.int32)
    inverse_before = np.array([0.2, 0.3, 0.7, 0.9], np.float32)
    positions = np.array([2, 7, 9, 11], np.int32)
    newest, inverse = np.full(4, -1, np.int32), np.zeros(4, np.float32)
    known = carry_duplicates(before, newest_before, inverse_before, positions, newest, inverse)
    assert known == 3
    assert newest.tolist() == [2, LOST, 0, -1]
    np.testing.assert_array_equal(inverse, np.array([0.2, 0.7, 0.9, 0], np.float32))


@given(st.integers(1, 20), st.integers(0, 10**6))
@MODERATE
def test_add_similarity_leaves_out_oneself_and_whom_one_spares(n_entries, seed):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n_entries, 5)).astype(np.float32)
    newest = np.array(
        [rng.choice([j for j in range(-1, n_entries) if j != i]) for i in range(n_entries)], np.int32
    )
    unit = keys / np.linalg.norm(keys, axis=1)[:, None]
    expected = [
        sum(unit[i] @ unit[j] for i in range(n_entries) if i != j and newest[i] != j)
        for j in range(n_entries)
    ]
    sums = np.empty(n_entries)
    add_similarity(keys, inverse_norms(keys), newest, sums)
    np.testing.assert_allclose(sums, expected, atol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
@MODERATE
def test_best_are_kept_in_slot_order(scores, data):
    n_kept = data.draw(st.integers(1, len(scores)))
    best = sorted(range(len(scores)), key=lambda slot: (scores[slot], slot))[-n_kept:]
    slots = np.empty(n_kept, np.int64)
    keep_best(np.array(scores, np.float32), np.float32(sorted(scores)[-n_kept]), slots)
    assert slots.tolist() == sorted(best)


def test_shares_are_taken_off_as_numpy_does(rng):
    scores, shares = rng.normal(size=(2, 50)).astype(np.float32)
    expected = np.float32(0.1) * scores[:41] - np.float32(0.9) * shares[:41]
    take_off(scores[:41], np.float32(0.1), shares, np.float32(0.9))
    np.testing.assert_array_equal(scores[:41], expected)


def test_protected_entries_are_infinite_and_the_first_bad_one_is_told():
    scores, positions = np.array([1, np.nan, 3, -np.inf, 5], np.float32), np.array([0, 4, 5, 8, 9], np.int32)
    checked = np.empty(5, np.float32)
    assert protect(scores, positions, 1, 8, checked) == 1
    np.testing.assert_array_equal(checked, np.array([np.inf, np.nan, 3, np.inf, np.inf], np.float32))
    assert protect(scores[2:3], positions[2:3], 0, 99, checked[:1]) == -1


@given(st.lists(st.integers(-3, 9), max_size=8))
@MODERATE
def test_increases_is_strict(numbers):
    assert increases(np.array(numbers, np.int32)) == all(a < b for a, b in pairwise(numbers))
