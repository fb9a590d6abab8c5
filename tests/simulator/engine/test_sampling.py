"""Samples: what is measured of a trace, how good the estimates are, and that decisions stay exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.cells import run_replay
from simulator.engine.full_cache import FullCache
from simulator.engine.loop import Engine
from simulator.engine.metrics import measure
from simulator.engine.request import Request
from simulator.engine.sampling import Sampling, _one_per_stratum, parse_sampling
from simulator.policies.language import parse_policy
from traces import open_trace
from traces.errors import UserError

EIGHTH = Sampling(Fraction(1, 8))
PARTS = [
    EIGHTH,
    Sampling(Fraction(1, 3)),
    Sampling(layers=4),
    Sampling(kv_heads=2),
    Sampling(kv_heads=1),
    Sampling(Fraction(1, 4), layers=4, kv_heads=2),
]


@pytest.fixture(scope="module")
def trace():
    return open_trace("sample")


@pytest.fixture(scope="module")
def replayed(trace):
    """Replay the bundled trace whole, once per policy."""
    known = {}

    def replay(policy):
        if policy not in known:
            known[policy] = Engine([Request(trace, parse_policy(policy, buffer=32), 96)]).run()[0]
        return known[policy]

    return replay


def part(values, sample, n_kv_heads):
    """Cut what a sample measures out of (n_layers, n_query_heads, n_steps)."""
    by_head = values.reshape(len(values), n_kv_heads, -1, values.shape[2])
    rows = [by_head[layer][heads] for layer, heads in zip(sample.layers, sample.kv_heads, strict=True)]
    return np.stack(rows).reshape(len(rows), -1, values.shape[2])[..., sample.steps]


@given(st.integers(1, 900), st.data())
@MODERATE
def test_one_of_each_run_is_drawn(n, data):
    n_drawn = data.draw(st.integers(1, n))
    drawn, weights = _one_per_stratum(n, n_drawn, np.random.default_rng(data.draw(st.integers(0, 99))))
    lengths = np.round(weights * n).astype(int)
    edges = np.concatenate([[0], lengths.cumsum()])
    assert edges[-1] == n
    assert lengths.max() - lengths.min() <= 1
    assert len(drawn) == n_drawn
    assert ((edges[:-1] <= drawn) & (drawn < edges[1:])).all()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", PARTS, ids=str)
def test_a_sampled_replay_decides_as_the_whole_one_and_measures_a_part_of_it(trace, replayed, sampling):
    whole, sample = replayed("rkv+utility"), sampling.draw(trace, seed=5)
    policy = parse_policy("rkv+utility", buffer=32)
    (outcome,) = Engine([Request(trace, policy, 96, sample=sample)]).run()
    np.testing.assert_array_equal(outcome.evicted_at, whole.evicted_at)
    np.testing.assert_array_equal(outcome.held, whole.held)
    expected = part(whole.mass, sample, trace.shape.n_kv_heads)
    np.testing.assert_allclose(outcome.mass, expected, rtol=0, atol=1e-5)
    full, seen = FullCache(trace), FullCache(trace, sample=sample)
    np.testing.assert_array_equal(seen.strongest, part(full.strongest, sample, trace.shape.n_kv_heads))
    largest = part(full.largest, sample, trace.shape.n_kv_heads)
    np.testing.assert_allclose(seen.largest, largest, rtol=0, atol=1e-5)


def test_the_same_seed_draws_the_same_and_another_one_other_parts(trace):
    sampling = PARTS[-1]
    one, again, other = (sampling.draw(trace, seed) for seed in (1, 1, 2))
    for name in ("steps", "layers", "kv_heads"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.steps, other.steps)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streamingllm", "snapkv", "rkv", "rkv+utility", "random"])
def test_an_eighth_of_the_queries_holds_the_mean_mass_in_its_interval(trace, replayed, policy):
    mass = replayed(policy).mass
    truth, held, widths = mass.mean(dtype=np.float64), 0, []
    for seed in range(100):
        sample = EIGHTH.draw(trace, seed)
        measured = part(mass, sample, trace.shape.n_kv_heads)
        widths.append(sample.half_width(measured))
        held += abs(sample.mean(measured) - truth) <= widths[-1]
    assert held >= 93
    # An interval that is of use: two percent of the full mass.
    assert np.mean(widths) < 0.02


@pytest.mark.parametrize("sampling", PARTS[2:], ids=str)
def test_layers_and_heads_hold_the_mean_mass_in_their_interval(trace, replayed, sampling):
    mass = replayed("rkv+utility").mass
    truth, held = mass.mean(dtype=np.float64), 0
    for seed in range(100):
        sample = sampling.draw(trace, seed)
        measured = part(mass, sample, trace.shape.n_kv_heads)
        held += abs(sample.mean(measured) - truth) <= sample.half_width(measured)
    assert held >= 93


@pytest.mark.slow
@pytest.mark.parametrize("sampling", PARTS, ids=str)
def test_estimates_are_unbiased(trace, replayed, sampling):
    mass = replayed("rkv").mass
    found = []
    for seed in range(400):
        sample = sampling.draw(trace, seed)
        found.append(sample.mean(part(mass, sample, trace.shape.n_kv_heads)))
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - mass.mean(dtype=np.float64)) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("sampling", PARTS, ids=str)
def test_a_row_of_a_sample_is_what_its_part_says(make_trace, sampling):
    trace = make_trace(n_layers=6, n_kv_heads=4, n_tokens=120)
    sample = sampling.draw(trace, 3)
    policy = parse_policy("snapkv:buffer=8")
    (outcome,) = Engine([Request(trace, policy, 20, sample=sample)]).run()
    full = FullCache(trace, sample=sample)
    row = measure(trace, outcome, full)
    (whole,) = Engine([Request(trace, policy, 20)]).run()
    everything = measure(trace, whole, FullCache(trace))

    def weighted(values):
        return np.einsum("lhs,l,s->", values, sample.layer_weights, sample.step_weights) / values.shape[1]

    assert row.mass_mean == pytest.approx(weighted(outcome.mass), abs=1e-7)
    assert row.low_mass_rate == pytest.approx(weighted(outcome.mass < 0.5))
    assert row.mass_error > 0
    assert everything.mass_error is None
    for name in ("entries_mean", "entries_peak", "bytes_mean", "bytes_peak", "n_steps", "n_evictions"):
        assert getattr(row, name) == getattr(everything, name)
    whole_heads = sampling.layers is None and sampling.kv_heads is None
    for name in ("mass_min_head", "lost_lookup_rms", "oracle_mass", "gap"):
        assert (getattr(row, name) is not None) == whole_heads
    assert row.lost_lookup_peak is None


def test_the_command_says_what_was_sampled(run_sim):
    asked = ("replay", "--trace", "sample", "-p", "rkv", "-b", "20%", "--buffer", "32", "--seed", "7")
    code, out, _ = run_sim(*asked, "--sample-queries", "1/8", "--sample-heads", "2", "--format", "json")
    assert code == 0
    assert '"sampling": "queries=1/8,heads=2"' in out
    code, out, _ = run_sim(*asked, "--sample-queries", "1/8")
    assert code == 0
    assert "Only a sample was measured: queries=1/8" in out
    assert "±95%" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sample-queries", "2"), "--sample-queries is '2'; allowed: a share above 0, up to 1"),
        (("--sample-queries", "half"), "--sample-queries is 'half'"),
        (("--sample-queries", "1/0"), "--sample-queries is '1/0'"),
        (("--sample-queries", "1/5000"), "less than two of 831 decode steps"),
        (("--sample-layers", "1"), "--sample-layers is 1; allowed for walk-n10-c2-s4-0000.kvtrace: 2 to 8"),
        (("--sample-layers", "9"), "2 to 8, its layers"),
        (("--sample-heads", "0"), "--sample-heads is 0"),
        (("--sample-heads", "5"), "1 to 4, the KV heads"),
    ],
)
def test_samples_that_cannot_be_are_refused_in_a_line(run_sim, options, said):
    code, _, err = run_sim("replay", "--trace", "sample", "-p", "rkv", "-b", "20%", *options)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_trajectory_is_not_of_a_sample(trace):
    with pytest.raises(UserError, match="a trajectory is of every decode step"):
        run_replay([trace], ["rkv"], ["20%"], sampling=EIGHTH, keep_trajectory=True)


def test_a_sample_that_does_not_fit_a_later_trace_costs_no_work(make_trace):
    traces, done = [make_trace(n_layers=4), make_trace()], []
    with pytest.raises(UserError, match="--sample-layers is 3; allowed for"):
        run_replay(traces, ["rkv"], [20], sampling=Sampling(layers=3), on_cell=lambda: done.append(1))
    assert not done


def test_shares_are_read_as_fractions():
    assert parse_sampling("0.125", None, None) == EIGHTH
    assert str(parse_sampling(None, 4, None)) == "layers=4"
    assert str(Sampling()) == ""
