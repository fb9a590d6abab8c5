"""Stored vectors times float32 ones, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.kernels.products import products
from traces.numbers import round_to_storage, to_float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 16), (3, 2, 4, 40)])
def test_products_are_sums_over_heads_and_width(dtype, shape):
    rng = np.random.default_rng(1)
    stored = round_to_storage(rng.standard_normal(shape, dtype=np.float32), dtype)
    outputs = rng.standard_normal(shape[1:], dtype=np.float32)
    expected = np.einsum("kgtd,gtd->kt", to_float32(stored, dtype).astype(np.float64), outputs)
    np.testing.assert_allclose(products(stored, dtype, outputs), expected, rtol=1e-5, atol=1e-5)
    # A part of what is stored, neither from its first head nor its first token on.
    part = products(stored[:, -1:, -1:], dtype, outputs[-1:, -1:])
    expected = to_float32(stored, dtype)[:, -1, -1].astype(np.float64) @ outputs[-1, -1]
    np.testing.assert_allclose(part[:, 0], expected, rtol=1e-5, atol=1e-5)
    # Tokens that are picked, and numbers of a row that lie apart.
    picked = [0, shape[2] - 1]
    expected = products(stored, dtype, outputs)[:, picked]
    np.testing.assert_array_equal(products(stored[:, :, picked], dtype, outputs[:, picked]), expected)
    apart = np.asfortranarray(stored)
    np.testing.assert_array_equal(products(apart, dtype, outputs), products(stored, dtype, outputs))
