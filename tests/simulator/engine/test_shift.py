"""How far predictions move: against one query, one head and one entry after the other, in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from naive_traces import small_trace

from simulator.cells import run_replay
from simulator.engine.layer import Retained
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.engine.shift import Sensitivities
from simulator.policies.language import parse_policy


def naive_shift(trace, retained, steps):
    """Give (n_layers, n_draws, n_steps): sums over heads of sensitivity times what an output loses."""
    shape, prompt = trace.shape, trace.prompt_tokens
    n_draws = trace.manifest.n_draws
    found = np.zeros((shape.n_layers, n_draws, len(steps)))
    for layer in range(shape.n_layers):
        queries, keys, values = (
            getattr(trace, name)(layer).astype(np.float64) for name in ("queries", "keys", "values")
        )
        sensitivity = trace.sensitivity(layer).astype(np.float64)
        for head in range(shape.n_query_heads):
            kv_head = head // shape.group_size
            for at, step in enumerate(steps):
                token = prompt + step
                held = np.arange(token + 1)
                for own in retained:
                    if (own.layer, own.kv_head) == (layer, kv_head) and own.n_tokens <= token:
                        held = np.concatenate([np.sort(own.positions), np.arange(own.n_tokens, token + 1)])
                difference = attend(queries[head, token], keys[kv_head], values[kv_head], held, trace.scale)
                difference -= attend(
                    queries[head, token], keys[kv_head], values[kv_head], np.arange(token + 1), trace.scale
                )
                found[layer, :, at] += sensitivity[:, head, step] @ difference
    return found


def attend(query, keys, values, held, scale):
    weights = np.exp(scale * (keys[held] @ query - (keys[held] @ query).max()))
    return weights @ values[held] / weights.sum()


def test_a_row_tells_the_mean_over_steps(tmp_path):
    trace = small_trace(tmp_path / "t.kvtrace", dtype="float32", n_tokens=60, n_draws=3)
    plain = small_trace(tmp_path / "plain.kvtrace", dtype="float32", n_tokens=60)
    asked = ["rkv:window=4,buffer=6", "fullkv"], [14]
    result = run_replay([trace], *asked, keep_retained=True)
    of_head = ["layer", "kv_head", "compression", "n_tokens"]
    kept = [
        Retained(*head, np.array(positions))
        for *head, positions in result.retained.group_by(of_head, maintain_order=True).agg("position").rows()
    ]
    shift = naive_shift(trace, kept, np.arange(trace.total_tokens - trace.prompt_tokens))
    expected = np.log1p(np.square(shift.sum(axis=0)).mean(axis=0) / 2).mean()
    row, full = result.table.iter_rows(named=True)
    assert row["shift_mean"] == pytest.approx(expected, rel=1e-5)
    assert full["shift_mean"] == 0
    # All else is as without.
    same = run_replay([plain], *asked).table
    assert same["shift_mean"].null_count() == 2
    others = [name for name in same.columns if name not in ("shift_mean", "seconds", "trace")]
    assert same.select(others).equals(result.table.select(others))
    # Of some heads it cannot be told, of some steps it can.
    some = Sampling(queries=Fraction(1, 2), kv_heads=1)
    assert run_replay([trace], *asked, sampling=some).table["shift_mean"].null_count() == 2
    half = run_replay([trace], *asked, sampling=Sampling(queries=Fraction(1, 2))).table["shift_mean"]
    assert half[0] == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["rkv:window=4", "h2o", "rkv+utility:window=4", "vatp:sinks=2"])
@pytest.mark.parametrize("share", [1, 0.5])
def test_the_shift_is_what_each_lost_entry_takes_away(tmp_path, dtype, policy, share):
    trace = small_trace(tmp_path / "t.kvtrace", dtype=dtype, n_tokens=60, n_draws=3)
    sample = Sampling(queries=Fraction(share)).draw(trace, 0) if share < 1 else EVERYTHING.draw(trace, 0)
    sensitivities = Sensitivities(trace, sample)
    request = Request(
        trace,
        parse_policy(policy, buffer=6),
        14,
        waves={},
        keep_retained=True,
        sample=sample,
        sensitivities=sensitivities,
    )
    (outcome,) = Engine([request]).run()
    expected = naive_shift(trace, outcome.retained, sample.steps)
    assert outcome.n_evicted > 0
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(outcome.shift, expected, atol=2e-5, rtol=1e-4)
