"""Compiled loops against plain ones."""

from __future__ import annotations

import numpy as np
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.kernels import add_attention_mass, add_similarity, max_pool


def masses(logits, lse=0.0, scale=1.0):
    """Give the mass of single entries, one per logit."""
    products = np.array(logits, np.float32)[:, None]
    mass = np.empty(len(products), np.float32)
    rows = np.full(len(products), lse, np.float32), np.ones(len(products), np.int64)
    add_attention_mass(products, np.float32(scale), *rows, mass)
    return mass


def test_exponential_is_as_exact_as_single_precision_allows():
    near, far = np.linspace(-2, 0, 4001, dtype=np.float32), np.linspace(-87, 0, 4001, dtype=np.float32)
    np.testing.assert_allclose(masses(near), np.exp(near.astype(np.float64)), rtol=4e-7)
    np.testing.assert_allclose(masses(far), np.exp(far.astype(np.float64)), rtol=1e-5)
    assert masses([0.0])[0] == 1


def test_hopeless_entries_add_nothing_that_counts():
    assert (masses([-88, -200, -1e4, -1e30]) < 1e-37).all()
    assert masses([50.0], lse=100.0, scale=2.0)[0] == 1


def test_rows_see_what_is_visible_to_them(rng):
    products = rng.normal(size=(4, 9)).astype(np.float32)
    n_visible, lse = np.array([1, 4, 9, 0]), np.array([1.5, 2, 3, 2], np.float32)
    mass = np.empty(4, np.float32)
    add_attention_mass(products, np.float32(0.5), lse, n_visible, mass)
    expected = [
        sum(np.exp(0.5 * products[row, j] - lse[row]) for j in range(n_visible[row])) for row in range(4)
    ]
    np.testing.assert_allclose(mass, expected, rtol=1e-6)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.sampled_from([1, 3, 5, 7, 31, 99]))
@MODERATE
def test_max_pool_takes_the_best_neighbour(values, kernel_size):
    half = kernel_size // 2
    expected = [max(values[max(j - half, 0) : j + half + 1]) for j in range(len(values))]
    pooled = np.empty(len(values), np.float32)
    max_pool(np.array(values, np.float32), kernel_size, pooled)
    assert pooled.tolist() == expected


def test_add_similarity_by_hand():
    similarity = np.array(
        [[9, 0.6, 0.7, 0.1], [0.6, 9, 0.5, 0.2], [0.7, 0.5, 9, 0.3], [0.1, 0.2, 0.3, 9]], np.float32
    )
    # Rows spare: 0 its entry 2, 1 its entry 0, 2 its entry 0; 0.5 does not exceed 0.5. Row 3 spares nothing,
    # or its entry 0, as the published code does.
    for spare_column0, expected in ((False, [0.1, 1.3, 0.8, 0.6]), (True, [0, 1.3, 0.8, 0.6])):
        sums = np.zeros(4)
        for first in (0, 3):  # in two blocks
            block = similarity[first : first + 3]
            add_similarity(block, first, np.float32(0.5), spare_column0, sums)
        np.testing.assert_allclose(sums, expected, rtol=1e-6, atol=1e-7)
