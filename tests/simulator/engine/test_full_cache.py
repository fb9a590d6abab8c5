"""The full cache's attention, checked against double precision and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from cases import MODERATE, draw_arrays
from hypothesis import given
from hypothesis import strategies as st
from naive_full_cache import brute_oracle, dense_weights

from simulator.engine import full_cache
from simulator.engine.full_cache import FullCache, group_weights, sampled_steps
from simulator.kernels import spans


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_group_weights_are_the_mean_attention_of_the_group(make_trace, dtype):
    trace = make_trace(n_tokens=40, prompt_tokens=10, group_size=3, dtype=dtype, scale=0.5)
    weights = dense_weights(trace)
    positions = np.array([3, 17, 39])
    for layer in range(2):
        rows = list(group_weights(trace, layer, positions))
        for position, row in zip(positions, rows, strict=True):
            assert row.shape == (2, position + 1)
            np.testing.assert_allclose(row.sum(axis=1), 1, atol=1e-5)
            heads = np.array([head[position] for head in weights[layer]])
            np.testing.assert_allclose(row, heads.reshape(2, 3, -1).mean(axis=1), atol=1e-6)


def test_oracle_is_brute_force(make_trace, rng):
    trace = make_trace(n_tokens=30, prompt_tokens=8)
    held = rng.integers(0, 4 * 30, size=22)
    oracle = FullCache(trace).oracle_mass(held)
    weights = dense_weights(trace)
    expected = [brute_oracle(trace, weights, count, step) for step, count in enumerate(held)]
    np.testing.assert_allclose(oracle, expected, atol=1e-6)


def test_oracle_of_the_whole_cache_is_one_and_grows_with_memory(make_trace):
    trace = make_trace()
    full = FullCache(trace)
    everything = 4 * np.arange(21, 61)
    np.testing.assert_allclose(full.oracle_mass(everything), 1, atol=1e-5)
    masses = [full.oracle_mass(np.minimum(everything, count)) for count in (0, 1, 10, 40, 90)]
    assert (masses[0] == 0).all()
    assert (np.diff(masses, axis=0) > 0).all()


def test_strongest_key_is_found_and_ties_go_to_the_later(make_trace, rng, monkeypatch):
    for kind in ("gaussian", "quantised"):
        trace = make_trace(arrays=draw_arrays(rng, kind, 2, 4, 2, 50, 6))
        expected = np.empty((2, 4, 30), int)
        for layer, heads in enumerate(dense_weights(trace)):
            for head, rows in enumerate(heads):
                for step, row in enumerate(rows[20:]):
                    best = max(row)
                    expected[layer, head, step] = max(j for j, weight in enumerate(row) if weight == best)
        np.testing.assert_array_equal(FullCache(trace).strongest, expected)
        with monkeypatch.context() as patched:
            patched.setattr(spans, "_BLOCK_TOKENS", 11)
            np.testing.assert_array_equal(FullCache(trace).strongest, expected)


def test_strongest_key_is_found_among_many(make_trace, rng):
    trace = make_trace(arrays=draw_arrays(rng, "gaussian", 1, 7, 1, 1100, 6))
    logits = trace.queries(0).astype(np.float64) @ trace.keys(0)[0].T.astype(np.float64)
    logits[:, np.triu_indices(1100, 1)[0], np.triu_indices(1100, 1)[1]] = -np.inf
    found, best = FullCache(trace).strongest[0], logits.max(axis=2)[:, 20:]
    np.testing.assert_allclose(
        np.take_along_axis(logits[:, 20:], found[..., None], 2)[..., 0], best, atol=1e-5
    )
    assert (found == logits.argmax(axis=2)[:, 20:]).mean() > 0.999


def test_large_traces_are_judged_at_fewer_steps(make_trace, monkeypatch):
    trace = make_trace()
    held = 4 * np.full(40, 12)
    every = FullCache(trace)
    assert every.oracle_at.tolist() == list(range(40))
    monkeypatch.setattr(full_cache, "_ORACLE_ELEMENTS", 4 * 60 * 10)
    fewer = FullCache(trace)
    assert len(fewer.oracle_at) == 10
    np.testing.assert_allclose(fewer.oracle_mass(held), every.oracle_mass(held)[fewer.oracle_at], rtol=1e-6)
    monkeypatch.setattr(full_cache, "_ORACLE_ELEMENTS", 1)
    assert len(FullCache(trace).oracle_at) == 8


@given(st.integers(1, 3000), st.integers(1, 300))
@MODERATE
def test_sampled_steps_are_spread_evenly_to_the_last(n_steps, n_samples):
    steps = sampled_steps(n_steps, n_samples)
    assert len(steps) == min(n_steps, n_samples)
    assert steps[0] >= 0
    assert steps[-1] == n_steps - 1
    gaps = np.diff(steps)
    assert len(gaps) == 0 or 0 < gaps.min() <= gaps.max() <= gaps.min() + 1
