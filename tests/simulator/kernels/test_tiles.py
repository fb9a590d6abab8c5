"""Products of a few keys with a few queries, and what is made of them, against plain loops."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit
from places import ROOT

from simulator.kernels import cpu, tiles
from simulator.kernels.attention import add_tile_mass, raise_strongest
from simulator.kernels.tiles import (
    ROWS,
    WIDTH,
    fill_panel,
    form_of,
    hide_unseen,
    multiply_pairs,
    multiply_tile,
)
from simulator.kernels.widening import KINDS
from traces.numbers import round_to_storage, to_float32

# What older processors have; Numba compiles for them on a newer one too.
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
SSE = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}


@njit
def _multiply(keys, n_rows, panel, tile):
    multiply_tile(keys, n_rows, panel, tile)


@njit
def _multiply_pairs(keys, n_rows, panel, tile):
    multiply_pairs(keys, n_rows, panel, tile)


@njit
def _hide(tile, first_slot, slots, group_size, first_column):
    hide_unseen(tile, first_slot, slots, group_size, first_column)


def _address(array):
    return array.__array_interface__["data"][0]


def _tile_of(keys, panel, multiply=_multiply):
    tile = np.full((ROWS, WIDTH), np.nan, np.float32)
    multiply(_address(keys), len(keys), panel, tile)
    return tile


def _panel_of(queries):
    """Fill a panel of queries that lie anywhere, each ``depth`` numbers that are 4 bytes wide."""
    panel = np.full((queries.shape[1] * queries.itemsize // 4, WIDTH), np.nan, np.float32)
    fill_panel(_address(queries) + queries.strides[0] * np.arange(WIDTH), panel)
    return panel


@pytest.mark.parametrize("head_dim", [1, 7, 16, 24, 128])
def test_tile_is_the_product_of_keys_and_queries(rng, head_dim):
    queries = rng.normal(size=(WIDTH, head_dim)).astype(np.float32)
    panel = _panel_of(queries)
    np.testing.assert_array_equal(panel, queries.T)
    many = rng.normal(size=(ROWS, head_dim)).astype(np.float32)
    whole = _tile_of(many, panel)
    np.testing.assert_allclose(whole, many.astype(np.float64) @ queries.T.astype(np.float64), atol=2e-5)
    for n_rows in range(1, ROWS):
        tile = _tile_of(many[:n_rows].copy(), panel)
        # Whatever stands beside it, a product is the same.
        np.testing.assert_array_equal(tile[:n_rows], whole[:n_rows])
        np.testing.assert_array_equal(tile[n_rows:], np.repeat(tile[n_rows - 1 : n_rows], ROWS - n_rows, 0))


def _bfloats(rng, n, head_dim):
    """Draw bfloat16 numbers of sizes that differ much; as stored and as float32."""
    numbers = rng.normal(size=(n, head_dim)) * 2.0 ** rng.integers(-20, 20, (n, head_dim))
    stored = round_to_storage(numbers.astype(np.float32), "bfloat16")
    return stored, to_float32(stored, "bfloat16")


@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_of_two_numbers_the_second_is_added_first(rng, head_dim):
    (_, keys), (_, queries) = (_bfloats(rng, n, head_dim) for n in (ROWS, WIDTH))
    sums = np.zeros((ROWS, WIDTH), np.float32)
    order = [at for even in range(0, head_dim - 1, 2) for at in (even + 1, even)]
    for at in [*order, *range(len(order), head_dim)]:
        # Exact, so that rounding is the sum's alone, with and without instructions that do both.
        products = keys[:, at, None] * queries[None, :, at]
        np.testing.assert_array_equal(products, keys[:, at, None].astype(float) * queries[None, :, at])
        sums += products
    np.testing.assert_array_equal(_tile_of(keys, _panel_of(queries)), sums)


@pytest.mark.skipif(not tiles.HAS_PAIRS, reason="this processor multiplies no pairs of bfloat16 numbers")
@pytest.mark.parametrize("head_dim", [2, 24, 64, 128])
def test_products_of_pairs_are_those_of_widened_numbers(rng, head_dim):
    (keys, wide_keys), (queries, wide_queries) = (_bfloats(rng, n, head_dim) for n in (ROWS, WIDTH))
    expected = _tile_of(wide_keys, _panel_of(wide_queries))
    panel = _panel_of(queries)
    np.testing.assert_array_equal(_tile_of(keys, panel, _multiply_pairs), expected)
    for n_rows in (1, ROWS - 1):
        tile = _tile_of(keys[:n_rows].copy(), panel, _multiply_pairs)
        np.testing.assert_array_equal(tile[:n_rows], expected[:n_rows])


def test_rows_may_begin_at_any_number(rng):
    stored, _ = _bfloats(rng, WIDTH, 45)
    odd = stored[:, 1:43]
    np.testing.assert_array_equal(_panel_of(odd), np.ascontiguousarray(odd).view(np.float32).T)


def test_pairs_are_of_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(tiles, "HAS_PAIRS", True)
    assert form_of("bfloat16", 128) == (KINDS["float32"], 64, True)
    assert form_of("bfloat16", 33) == (KINDS["bfloat16"], 33, False)
    assert form_of("float16", 128) == (KINDS["float16"], 128, False)
    monkeypatch.setattr(tiles, "HAS_PAIRS", False)
    assert form_of("bfloat16", 128) == (KINDS["bfloat16"], 128, False)


def test_tile_is_written_within_a_larger_array(rng):
    keys, queries = rng.normal(size=(ROWS, 8)).astype(np.float32), rng.normal(size=(8, WIDTH))
    panel = queries.astype(np.float32)
    around = np.full((ROWS + 2, WIDTH + 5), 7, np.float32)
    _multiply(_address(keys), ROWS, panel, around[1:-1, 3:-2])
    np.testing.assert_array_equal(around[1:-1, 3:-2], _tile_of(keys, panel))
    around[1:-1, 3:-2] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 100])
def test_what_is_not_seen_is_hidden(group_size):
    slots = np.array([5, 6, 9, 10, 30])
    n_columns = -(-len(slots) * group_size // WIDTH) * WIDTH
    for first_slot in range(12):
        for first_column in range(0, n_columns, WIDTH):
            tile = np.ones((ROWS, WIDTH), np.float32)
            _hide(tile, first_slot, slots, group_size, first_column)
            for row, column in np.ndindex(tile.shape):
                token = (first_column + column) // group_size
                if token < len(slots):
                    assert (tile[row, column] == 1) == (first_slot + row <= slots[token])


def _masses(logits, lse=0.0, scale=1.0):
    """Give the mass of an entry of each logit, where all of a tile are alike."""
    found = []
    for first in range(0, len(logits), WIDTH):
        some = np.array(logits[first : first + WIDTH], np.float32)
        tile = np.full((ROWS, WIDTH), -np.inf, np.float32)
        tile[:, : len(some)] = some
        mass = np.zeros(WIDTH, np.float32)
        add_tile_mass(tile, np.float32(scale), np.full(WIDTH, lse, np.float32), mass)
        found.append(mass[: len(some)] / ROWS)
    return np.concatenate(found)


def test_exponential_is_as_exact_as_single_precision_allows():
    near, far = np.linspace(-2, 0, 4001, dtype=np.float32), np.linspace(-87, 0, 4001, dtype=np.float32)
    np.testing.assert_allclose(_masses(near), np.exp(near.astype(np.float64)), rtol=6e-7)
    np.testing.assert_allclose(_masses(far), np.exp(far.astype(np.float64)), rtol=1e-5)
    assert _masses([0.0])[0] == 1


def test_hopeless_entries_add_nothing_that_counts():
    assert (_masses([-88, -200, -1e4, -1e30, -np.inf]) < 1e-36).all()
    assert _masses([50.0], lse=100.0, scale=2.0)[0] == 1


def test_mass_of_a_tile_is_added(rng):
    tile = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    tile[rng.random(tile.shape) < 0.3] = -np.inf
    lse, mass = rng.normal(2, 1, size=WIDTH).astype(np.float32), np.ones(WIDTH, np.float32)
    add_tile_mass(tile, np.float32(0.5), lse, mass)
    expected = 1 + np.exp(0.5 * tile.astype(np.float64) - lse).sum(axis=0)
    np.testing.assert_allclose(mass, expected, rtol=2e-6)


def test_strongest_of_tiles_is_the_latest_of_the_largest(rng):
    whole = rng.integers(0, 5, size=(4 * ROWS, WIDTH)).astype(np.float32)
    whole[-3:] = -np.inf
    whole[:, 0] = -np.inf
    largest, strongest = np.full(WIDTH, -np.inf, np.float32), np.full(WIDTH, -7, np.int32)
    for first in range(0, len(whole), ROWS):
        raise_strongest(whole[first : first + ROWS].copy(), 100 + first, largest, strongest)
    np.testing.assert_array_equal(largest, whole.max(axis=0))
    last = 100 + len(whole) - 1 - whole[::-1].argmax(axis=0)
    assert strongest[1:].tolist() == last[1:].tolist()
    assert strongest[0] == -7  # a query that sees nothing


def test_registers_hold_a_tile(monkeypatch):
    for features, arm, plan in (
        ({"avx512f", "avx2", "fma"}, False, (12, 2, 16)),
        ({"avx2", "fma"}, False, (6, 2, 8)),
        ({"avx2"}, False, (6, 2, 4)),
        (set(), True, (6, 4, 4)),
    ):
        monkeypatch.setattr(tiles, "cpu_features", lambda features=features: frozenset(features))
        monkeypatch.setattr(tiles, "is_arm", lambda arm=arm: arm)
        assert tiles._register_plan() == plan


def test_pairs_take_an_instruction_and_a_compiler_that_knows_it(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset({"avx512f", "avx512bf16"}))
    monkeypatch.setattr(cpu, "llvm_version_info", (20, 1, 8))
    assert cpu.multiplies_pairs()
    monkeypatch.setattr(cpu, "llvm_version_info", (15, 0, 7))
    assert not cpu.multiplies_pairs()
    monkeypatch.setattr(cpu, "llvm_version_info", (20, 1, 8))
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset({"avx512f"}))
    assert not cpu.multiplies_pairs()


def test_features_are_those_numba_is_told_to_use(monkeypatch):
    monkeypatch.setattr(cpu.config, "CPU_FEATURES", None)
    monkeypatch.setattr(cpu, "get_host_cpu_features", lambda: "+sse2,-avx512f,+fma")
    assert cpu.cpu_features() == {"sse2", "fma"}
    monkeypatch.setattr(cpu.config, "CPU_FEATURES", "+avx2,-fma")
    assert cpu.cpu_features() == {"avx2"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or cpu.is_arm(), reason="x86 processors")
@pytest.mark.parametrize(("target", "width"), [(AVX2, 16), (SSE, 8)], ids=["avx2", "sse"])
def test_other_processors_get_other_tiles(target, width, machine_code):
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from simulator.kernels.tiles import WIDTH; assert WIDTH == {width}; import pytest, sys;"
            "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-k', 'not processors', "
            "'tests/simulator/kernels/test_tiles.py', 'tests/simulator/kernels/test_measure.py']))",
        ],
        cwd=ROOT,
        env=os.environ
        | target
        | {"NUMBA_CACHE_DIR": str(machine_code(f"tiles-{width}")), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-1000:]
