"""``sim validate masked``: the divergence of what a replay retains."""

from __future__ import annotations

import json

import pytest
from spies import NAME
from verb_runs import one_line

from simulator.policies.language import parse_policy
from validate.levels.runs import run_masked
from validate.models.load import load_model


def test_the_masked_level_tells_how_far_predictions_move(level, folder, trace):
    code, out, err = level("masked", "-p", "rkv,fullkv", "--format", "json", "--seed", 1)
    assert (code, err) == (0, "")
    model = load_model(str(folder / NAME), "float32", "cpu").model
    expected = run_masked(model, trace, parse_policy("rkv", buffer=6), 20)
    rkv, full = json.loads(out)
    assert {name: rkv[name] for name in expected.row()} == pytest.approx(expected.row(), abs=1e-6)
    assert rkv["kl_mean"] > 1e-4 > full["kl_mean"] >= 0
    assert full["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert full["top_changed"] == 0


def test_a_foreign_trace_is_one_line(run_sim, folder, make_trace):
    named = ["--model", folder / NAME, "--trace", make_trace(head_dim=16).path, "--device", "cpu"]
    code, _, said = run_sim("validate", "masked", *named, "-p", "rkv,h2o", "-b", "20", "--buffer", 6)
    assert code == 2
    one_line(said, "allowed: the model the trace was recorded from")
