"""The Reasoning Wave: measured by the paper's definition, stored, and kept from judging its own traces."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from agreement import make_wave
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st
from naive_full_cache import dense_weights

from simulator.cells import run_replay
from simulator.engine.demand import calibrate
from simulator.engine.full_cache import sampled_steps
from simulator.policies.wave import entries_to_hold, known_waves, read_wave
from traces.errors import MissingDataError, TraceError, UserError


def shortest_prefix(weights, rho):
    held = 0.0
    for count, weight in enumerate(sorted(weights, reverse=True), start=1):
        held += weight
        if held >= rho:
            return count
    return len(weights)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12).filter(any), st.sampled_from([0.5, 0.93, 0.999]))
@MODERATE
def test_entries_to_hold_is_the_shortest_prefix(parts, rho):
    weights = np.array([parts], np.float32) / np.float32(sum(parts))
    assert entries_to_hold(weights, rho)[0] == shortest_prefix(weights[0].astype(float), rho)


def test_entries_to_hold_by_hand():
    weights = np.array([[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]], np.float32)
    assert entries_to_hold(weights, 0.75).tolist() == [2, 3, 1]
    assert entries_to_hold(weights, 0.76).tolist() == [3, 4, 1]
    assert entries_to_hold(weights * np.float32(0.9), 0.93).tolist() == [4, 4, 4]


@pytest.mark.parametrize("steps_per_trace", [64, 7])
def test_calibration_is_the_papers_definition(make_trace, steps_per_trace):
    traces = [
        make_trace(n_tokens=40, prompt_tokens=10, group_size=3),
        make_trace(prompt_tokens=50, group_size=3),
    ]
    wave = calibrate(traces, 0.8, steps_per_trace)
    demand, n_steps = np.zeros((2, 2)), 0
    for trace in traces:
        weights = dense_weights(trace)
        for step in sampled_steps(trace.total_tokens - trace.prompt_tokens, steps_per_trace).tolist():
            n_steps += 1
            for layer in range(2):
                for kv_head in range(2):
                    rows = [weights[layer][3 * kv_head + g][trace.prompt_tokens + step] for g in range(3)]
                    mean = [math.fsum(column) / 3 for column in zip(*rows, strict=True)]
                    demand[layer, kv_head] += shortest_prefix(mean, 0.8)
    np.testing.assert_allclose(wave.head_demand, demand / n_steps, atol=1e-3)
    np.testing.assert_allclose(wave.demand, (demand / n_steps).mean(axis=1), atol=1e-3)
    assert wave.n_steps == n_steps
    assert wave.trace_ids == tuple(trace.trace_id for trace in traces)
    assert (wave.model, wave.rho) == ("custom", 0.8)


def test_calibration_refuses_in_words(make_trace):
    trace = make_trace()
    for rho in (0, 1, -0.5, 93, float("nan")):
        with pytest.raises(UserError, match=f"rho is {rho}"):
            calibrate([trace], rho)
    with pytest.raises(UserError, match="at least one trace"):
        calibrate([])
    with pytest.raises(UserError, match="custom, other"):
        calibrate([trace, make_trace(model="other")])
    with pytest.raises(UserError, match="several models"):
        calibrate([trace, make_trace(n_layers=3)])


def test_a_wave_survives_its_file(make_trace, tmp_path):
    wave = calibrate([make_trace()])
    wave.write(tmp_path / "wave.json")
    assert read_wave(tmp_path / "wave.json") == wave
    assert [path.name for path in tmp_path.glob("wave*")] == ["wave.json"]


def test_given_waves_come_before_shipped_ones(make_trace, tmp_path):
    trace = make_trace()
    wave = make_wave(trace, [3.0, 5.0])
    wave.write(tmp_path / "one.json")
    replace(wave, demand=(9.0, 9.0)).write(tmp_path / "two.json")
    known = known_waves([tmp_path / "one.json", tmp_path / "two.json"])
    assert known["custom"].demand == (9.0, 9.0)
    assert set(known) - {"custom"} == set(known_waves())


def unsigned(path):
    """Give what a wave's file says but its digest, as if it had been written by hand."""
    content = json.loads(path.read_text())
    del content["sha256"]
    return content


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": ["a"]}, "model is ['a']; allowed: str"),
        ({"rho": float("nan")}, "nan found; allowed: finite"),
        ({"rho": 1.5}, "rho is 1.5; allowed: float < 1.0"),
        ({"n_steps": "64"}, "n_steps is '64'; allowed: int"),
        ({"head_demand": [[1.0, 2.0], [3.0]]}, "head_demand has 2 layers of [1, 2] KV heads"),
        ({"head_demand": [[1.0, 2.0]]}, "head_demand has 1 layers"),
        ({"trace_ids": [["a"]]}, "trace_ids[0] is ['a']; allowed: str"),
        ({"version": 2}, "format 'kvbudget-wave' 2 found; allowed: 'kvbudget-wave' 1"),
        ({"format": "kvtrace"}, "format 'kvtrace' 1 found"),
        ({"demand": "high"}, "demand is 'high'; allowed: array"),
        ({"demand": None}, "demand is None; allowed: array"),
        ({"rhythm": 1}, "field 'rhythm' is unknown"),
    ],
)
def test_what_is_no_wave_is_refused(change, named, make_trace, tmp_path):
    path = tmp_path / "wave.json"
    make_wave(make_trace(), [3.0, 5.0]).write(path)
    path.write_text(json.dumps({**unsigned(path), **change}))
    with pytest.raises(MissingDataError, match=re.escape(named)) as refusal:
        read_wave(path)
    assert refusal.value.exit_code == 4
    assert str(path) in str(refusal.value)


def test_a_wave_that_was_changed_is_refused_and_one_by_hand_is_read(make_trace, tmp_path):
    path, by_hand = tmp_path / "wave.json", tmp_path / "by-hand.json"
    wave = make_wave(make_trace(), [3.0, 5.0])
    wave.write(path)
    by_hand.write_text(json.dumps(unsigned(path)))
    assert read_wave(path) == read_wave(by_hand) == wave
    path.write_text(path.read_text().replace("3.0", "4.0"))
    with pytest.raises(MissingDataError, match="was changed since it was written"):
        read_wave(path)


def test_a_wave_of_another_shape_is_refused_before_any_cell(make_trace, tmp_path):
    trace, path = make_trace(n_layers=3), tmp_path / "wave.json"
    make_wave(make_trace(), [3.0, 5.0]).write(path)
    with pytest.raises(MissingDataError, match=r"has 2 layers of 2 KV heads; allowed: 3 of 2"):
        run_replay([trace], ["rkv", "rkv+wave"], [20], waves=[path])


def test_missing_or_unreadable_wave_is_refused(tmp_path):
    with pytest.raises(MissingDataError, match=r"gone\.json"):
        read_wave(tmp_path / "gone.json")
    for text in ("", "[1]", "{}", "{", "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(MissingDataError, match=r"bad\.json"):
            read_wave(tmp_path / "bad.json")


def test_a_wave_does_not_judge_its_own_trace(make_trace, tmp_path):
    own, other = make_trace(), make_trace()
    calibrate([own]).write(tmp_path / "wave.json")
    result = run_replay([own, other], ["rkv+wave", "rkv"], [20], waves=[tmp_path / "wave.json"])
    assert result.exit_code == 1
    assert result.table["status"].to_list() == ["error", "ok", "ok", "ok"]
    assert "was used to calibrate" in result.table["error"][0]


@pytest.mark.parametrize("value", [float("nan"), 0, -3, float("inf")])
def test_a_wave_with_an_impossible_demand_is_refused(value, make_trace, tmp_path):
    wave = calibrate([make_trace()])
    replace(wave, demand=(value, *wave.demand[1:])).write(tmp_path / "w.json")
    with pytest.raises(MissingDataError, match=r"allowed: (float > 0\.0|finite)"):
        read_wave(tmp_path / "w.json")


def test_calibration_refuses_what_it_cannot_measure(make_trace):
    with pytest.raises(UserError, match="no decode step"):
        calibrate([make_trace(n_tokens=20, prompt_tokens=20)])
    damaged = make_trace()
    layer = damaged.path / "layer_001.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    with pytest.raises(TraceError, match="layer_001"):
        calibrate([damaged])


def test_a_wave_of_another_revision_is_refused(make_trace, tmp_path):
    calibration = make_trace(model="m", model_revision="a")
    calibrate([calibration]).write(tmp_path / "w.json")
    judged = {revision: make_trace(model="m", model_revision=revision) for revision in ("a", "b", "")}
    for revision, trace in judged.items():
        result = run_replay([trace], ["reasonalloc"], [20], waves=tmp_path / "w.json")
        assert result.exit_code == (4 if revision == "b" else 0)


def test_calibration_refuses_to_mix_revisions(make_trace):
    traces = [make_trace(model="m", model_revision=revision) for revision in ("a", "b")]
    with pytest.raises(UserError, match="m a, m b; allowed: one"):
        calibrate(traces)
