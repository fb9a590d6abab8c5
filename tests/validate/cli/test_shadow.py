"""``sim validate shadow``: decisions are counted, differences end with exit code 1."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from spies import NAME
from verb_runs import one_line

from simulator.policies.language import parse_policy
from validate.levels.folder import level_version
from validate.levels.runs import Shadow, run_shadow
from validate.models.load import load_model


def test_the_shadow_level_counts_decisions_and_mismatches(level, folder, trace):
    code, out, err = level("shadow", "-p", "rkv,random", "--format", "json", "--seed", 1)
    assert (code, err) == (0, "")
    model = load_model(str(folder / NAME), "float32", "cpu").model
    expected = run_shadow(model, trace, parse_policy("random", buffer=6), 20, seed=1)
    rkv, random = json.loads(out)
    assert rkv["policy"] == "rkv"
    assert random.pop("code_version") == level_version()
    assert random == {
        "level": "shadow",
        "model": "tiny",
        "family": "walk",
        "status": "ok",
        "trace_id": trace.trace_id,
        "trace": trace.path.name,
        "policy": "random",
        "policy_params": parse_policy("random", buffer=6).parameters_json,
        "budget_asked": 20.0,
        "budget_unit": "entries",
        "budget_kind": "kept",
        "decisions": len(expected.expected),
        "mismatches": 0,
        "keys_equal": True,
    }
    assert random["decisions"] >= 2 * 2 * 4


def test_a_mismatch_ends_with_exit_code_1(level, monkeypatch):
    monkeypatch.setattr(Shadow, "mismatches", property(lambda self: self.expected[:2]))
    code, out, _ = level("shadow", "-p", "rkv")
    assert code == 1
    assert re.search(r"rkv +20 +\d+ +2 ", out), out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.json", "rows.txt"])
def test_levels_are_written_to_a_file(level, tmp_path, name):
    code, out, err = level("shadow", "-p", "rkv", "-o", tmp_path / name)
    assert (code, out, err) == (0, "", f"sim: wrote {tmp_path / name}: 1 row\n")
    if name.endswith("parquet"):
        assert pl.read_parquet(tmp_path / name)["mismatches"].to_list() == [0]
    else:
        assert "mismatches" in (tmp_path / name).read_text()


def test_cells_that_fail_leave_the_others(level, run_sim, trace):
    code, out, err = level("shadow", "-p", "rkv,rkv+wave,snapkv", "--format", "json", budget="3,20")
    assert code == 1
    assert [row["policy"] for row in json.loads(out)] == ["rkv", "snapkv"]
    lines = err.splitlines()
    assert all(line.startswith("sim: ") for line in lines)
    assert "budget 3 entries" in lines[0]
    assert NAME in lines[-2]  # the model without a wave
    assert lines[-1] == "sim: 4 cells failed, the others are written"


def test_a_model_of_another_trace_and_a_missing_wave_are_one_line(level, run_sim, trace):
    code, out, err = level("shadow", "-p", "rkv+wave")
    assert (code, out) == (4, "")
    one_line(err, "wave")
    code, _, err = run_sim("validate", "shadow", "--trace", trace.path, "--device", "cpu", "-b", "20%")
    assert code == 2
    one_line(err, "allowed: the model the trace was recorded from")


def test_a_missing_trace_exits_3(run_sim, tmp_path):
    code, _, err = run_sim("validate", "shadow", "--trace", tmp_path / "none*.kvtrace")
    assert code == 3
    one_line(err, "none*.kvtrace")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing option '--trace'"),
        (["--trace", "sample", "--limit", 1], "No such option: --limit"),
        (["--trace", "sample", "--prompts", "p.jsonl"], "No such option: --prompts"),
        (["--trace", "sample", "--steps", "s.parquet"], "No such option: --steps"),
        (["--trace", "sample", "-o", "rows.xml"], "suffix tells no format"),
    ],
)
def test_mistakes_are_one_line(run_sim, options, words):
    code, out, err = run_sim("validate", "shadow", *options)
    assert (code, out) == (2, "")
    one_line(err, words)
