"""Every number of a result row, computed a second time from the slow twin."""

from __future__ import annotations

from dataclasses import fields, replace

import naive
import numpy as np
import pytest
from agreement import make_wave
from cases import MODERATE, cases
from hypothesis import given
from naive_full_cache import brute_oracle, dense_weights

import simulator
from simulator.cells import run_replay
from simulator.engine.full_cache import FullCache
from simulator.engine.loop import Engine
from simulator.engine.metrics import Metrics, measure
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from traces.errors import TraceError


@pytest.mark.parametrize(
    "policy", ["fullkv", "snapkv:buffer=5", "rkv+utility:buffer=5,delta=10", "random:buffer=3"]
)
def test_a_row_is_what_the_twin_measures(policy, make_trace):
    trace = make_trace(group_size=3, scale=1.0)
    row = run_replay([trace], [policy], [14], seed=2).table.row(0, named=True)
    run = naive.simulate(trace, policy, 14, seed=2)
    weights = dense_weights(trace)
    oracle = np.array([brute_oracle(trace, weights, held, step) for step, held in enumerate(run.held)])
    near = {"rel": 0, "abs": 1e-5}
    assert row["entries_mean"] == pytest.approx(run.held.mean() / 4)
    assert row["entries_peak"] == run.held.max() / 4
    # An entry is a key and a value of 8 numbers of 2 bytes.
    assert row["bytes_mean"] == round(run.held.mean() * 32)
    assert row["bytes_peak"] == run.held.max() * 32
    assert row["mass_mean"] == pytest.approx(run.mass.mean(), **near)
    assert row["mass_p05"] == pytest.approx(np.quantile(run.mass, 0.05), **near)
    kv_heads = run.mass.reshape(2, 2, 3, -1).mean(axis=(2, 3))
    assert row["mass_min_head"] == pytest.approx(kv_heads.min(), **near)
    assert row["miss_rate"] == pytest.approx(run.missed.mean(), abs=1e-12)
    assert row["low_mass_rate"] == pytest.approx((run.mass < 0.5).mean(), abs=1e-12)
    largest = [[[max(step) for step in head[20:]] for head in layer] for layer in weights]
    lost = run.missed & (np.array(largest) > 0.5)
    assert row["lost_lookup_rate"] == pytest.approx(lost.mean(), abs=1e-12)
    per_step = lost.mean(axis=(0, 1))
    assert row["lost_lookup_rms"] == pytest.approx(np.sqrt((per_step**2).mean()), abs=1e-12)
    tried = (np.array(largest) > 0.5).sum(axis=(0, 1))
    shares = [lost[:, :, s].sum() / n for s, n in enumerate(tried) if n >= 2]
    assert row["lost_lookup_peak"] == pytest.approx(max(shares, default=0.0), abs=1e-12)
    assert row["oracle_mass"] == pytest.approx(oracle.mean(), **near)
    assert row["gap"] == pytest.approx(oracle.mean() - run.mass.mean(), **near)
    assert row["n_steps"] == 40
    assert row["n_evictions"] == run.n_evicted
    if policy != "fullkv":
        assert 0 < row["miss_rate"] < 1
        assert 0 < row["low_mass_rate"] < 1
        assert 0 < row["lost_lookup_rate"] < row["miss_rate"]


@pytest.mark.slow
@given(cases())
@MODERATE
def test_the_oracle_is_a_bound(shared_folder, case):
    trace = case.write(shared_folder)
    waves = {trace.model: make_wave(trace, case.demand)}
    (outcome,) = Engine([Request(trace, parse_policy(case.policy), case.entries, waves=waves)]).run()
    full = FullCache(trace)
    metrics = measure(trace, outcome, full)
    assert metrics.gap >= -1e-6
    at_steps = outcome.mass[:, :, full.oracle_at].mean(axis=(0, 1))
    assert (full.oracle_mass(outcome.held) >= at_steps - 1e-6).all()


def test_gap_of_a_sampled_oracle_compares_the_same_steps(make_trace, monkeypatch):
    trace = make_trace()
    (outcome,) = Engine([Request(trace, parse_policy("snapkv:buffer=5"), 14)]).run()
    monkeypatch.setattr("simulator.engine.full_cache._ORACLE_ELEMENTS", 1)
    full = FullCache(trace)
    metrics = measure(trace, outcome, full)
    at_steps = outcome.mass[:, :, full.oracle_at].mean()
    assert metrics.gap == pytest.approx(full.oracle_mass(outcome.held).mean() - at_steps, abs=1e-6)


def test_an_entry_evicted_after_a_step_was_not_missed_at_it(make_trace):
    # One key towers over all others until it is evicted at 40 tokens.
    queries, keys = np.zeros((1, 1, 60, 4)), np.zeros((1, 1, 60, 4))
    queries[..., 0], keys[0, 0, 5, 0] = 1, 10
    trace = make_trace(arrays=(queries, keys))
    policy = parse_policy("streamingllm:buffer=20,sinks=0")
    (outcome,) = Engine([Request(trace, policy, 20)]).run()
    assert outcome.evicted_at[0, 0, 5] == 40
    row = measure(trace, outcome, FullCache(trace))
    # Decode steps are at positions 20 to 59; the step at position 39 still attends to it.
    assert row.miss_rate == 20 / 40
    assert (outcome.mass[0, 0, :20] == 1).all()
    assert outcome.mass[0, 0, 20] < 0.5


@pytest.mark.parametrize("scale", [40.0, 1e4])
def test_numbers_that_no_sound_trace_gives_fail_their_cell(make_trace, scale):
    trace = make_trace()
    wrong = replace(trace, manifest=replace(trace.manifest, scale=scale))
    table = simulator.replay(wrong, ["rkv", "random"], [20], check=False)
    assert set(table["status"]) == {"error"}
    assert all("do not fit together" in error for error in table["error"])
    assert table["mass_mean"].null_count() == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("mass_mean", 1.2), ("mass_mean", float("nan")), ("miss_rate", -0.1), ("n_steps", -1), ("gap", -2.0)],
)
def test_a_number_out_of_its_range_is_named(name, value):
    numbers = {item.name: 0.5 for item in fields(Metrics)}
    with pytest.raises(TraceError, match=f"{name} is .*; allowed: "):
        Metrics(**numbers | {name: value})
