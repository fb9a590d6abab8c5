"""Input that nobody means: one line, the right exit code, at once."""

from __future__ import annotations

import json
import time

import numpy as np
import polars as pl
import pytest
from sweeps import write_spec

import simulator
from simulator.results.output import write_parquet, write_rows
from simulator.sweep.folder import SweepFolder
from traces.errors import UserError
from validate.cli.options import asked_cells
from validate.problems.prompts import read_prompts

DEEP = "[" * 5000 + "]" * 5000


def one_line(err, words):
    assert err.count("\n") == 1
    assert err.startswith("sim: ")
    assert words in err


@pytest.fixture
def spec(make_trace, tmp_path):
    """Write a spec of one trace; text in place of a value stands as it is."""
    trace = make_trace()

    def write(**content):
        asked = {"traces": [str(trace.path)], "policies": ["streamingllm"], "budgets": [20]} | content
        return write_spec(tmp_path, **asked)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"seeds": [2**63]}, "allowed: 64 bits"),
        ({"seeds": [-1]}, "seeds is -1; allowed: a whole number from 0 to 9223372036854775807"),
        ({"seeds": [True]}, "seeds is True"),
        ({"budgets": [float("nan")]}, "nan found; allowed: finite"),
        (
            {"sampling": {"layers": 2**62}},
            "--sample-layers is 4611686018427387904; allowed for made-0.kvtrace: 2",
        ),
        ({"sampling": {"layers": 2**70}}, "allowed: 64 bits"),
        ({"sampling": {"kv_heads": 99}}, "--sample-heads is 99"),
        ({"sampling": {"queries": "1/99999"}}, "less than two of 40 decode steps"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_refuses_what_a_run_would(spec, run_sim, content, words, dry):
    code, out, err = run_sim("sweep", spec(**content), "--jobs", 1, *(["--dry-run"] if dry else []))
    assert (code, out) == (2, "")
    one_line(err, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budgets = [" + "9" * 5001 + "]", "not valid TOML"),
        ('budgets = ["' + "9" * 5001 + '"]', "is out of range"),
        ("budgets = " + DEEP, "levels of nesting"),
        ('out = "a\\u0000b"', "out is 'a\\x00b'; allowed: the name of a folder"),
        ("traces = []\ntraces = []", "not valid TOML"),
    ],
)
def test_a_spec_of_hostile_text_is_one_line(spec, run_sim, tmp_path, text, words):
    path = spec()
    name = text.partition(" ")[0]
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{name} ")]
    path.write_text("\n".join([text, *lines]))
    code, _, err = run_sim("sweep", path, "--dry-run")
    assert code == 2
    one_line(err, words)


@pytest.mark.slow
def test_too_many_combinations_are_counted_at_once(spec, run_sim, trace_of_one):
    started = time.perf_counter()
    code, _, err = run_sim("sweep", spec(parameters={"buffer": [*range(1, 200_000)]}), "--dry-run")
    assert code == 2
    one_line(
        err, "asks for 199999 combinations of policy, parameters, budget and seed; allowed: at most 100000"
    )
    budgets = ",".join(map(str, range(10, 60_000)))
    code, _, err = run_sim("replay", "-t", trace_of_one, "-p", "rkv,random", "-b", budgets)
    assert code == 2
    one_line(err, "2 policies at 59990 budgets are 119980 cells a trace; allowed: at most 100000")
    assert time.perf_counter() - started < 20  # laying them out takes minutes


@pytest.fixture
def trace_of_one(make_trace):
    return make_trace().path


@pytest.mark.slow
@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_no_table_holds_is_refused_by_every_verb(run_sim, trace_of_one, tmp_path, seed):
    rows = tmp_path / "rows.parquet"
    run_sim("replay", "-t", trace_of_one, "-p", "rkv", "-b", 20, "--buffer", 5, "-o", rows)
    for verb in (
        ["replay", "-t", trace_of_one, "-p", "random", "-b", 20, "--buffer", 5],
        ["trace", "make", tmp_path / "t.kvtrace"],
        ["validate", "shadow", "-t", trace_of_one, "-p", "random", "-b", 20],
        ["report", rows, "--out", tmp_path / "page.html"],
        ["search", "--trace", trace_of_one, "--held-out", trace_of_one, "-b", 20, "--out", tmp_path / "s"],
    ):
        code, _, err = run_sim(*verb, "--seed", seed)
        assert code == 2, verb
        one_line(err, "allowed: a whole number from 0 to 9223372036854775807")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "levels of nesting"),
        (DEEP, "levels of nesting"),
        ('[{"policy": ["rkv"], "budget": 20}]', "[0].policy is ['rkv']; allowed: str"),
        ('[{"policy": "rkv", "policy": "h2o", "budget": 20}]', "'policy' stands twice"),
        ('[{"policy": "rkv", "budget": NaN}]', "nan found"),
        ('{"policy": "rkv"}', "allowed: array"),
    ],
)
def test_configurations_of_hostile_text_are_one_line(tmp_path, text, words):
    path = tmp_path / "configs.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        asked_cells(None, None, path, None)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a\\ud800"}', "lone surrogate"),
        ('{"prompt": "a", "answer": "\\udfff"}', "lone surrogate"),
        ('{"prompt": "a", "level": ' + DEEP + "}", "levels of nesting"),
        ('{"prompt": "a", "answer": ' + "9" * 5001 + "}", "5001 digits"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    ],
)
def test_prompts_of_hostile_text_are_one_line(tmp_path, row, words):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{row}\n')
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    assert "line 2: " in str(refused.value)
    assert words in str(refused.value)


def test_a_sweep_whose_files_have_other_columns_is_told(spec, run_sim, tmp_path):
    path, out = spec(), tmp_path / "out"
    assert run_sim("sweep", path, "--jobs", 1, "-q")[0] == 0
    (part,) = (out / "parts").iterdir()
    plan = out / "cells.parquet"
    sound = pl.read_parquet(part)
    for changed, words in (
        (sound.drop("policy"), "has no column 'policy'"),
        (sound.with_columns(budget_asked=pl.lit("20")), "column 'budget_asked' is String; allowed: Float64"),
    ):
        part.unlink()
        SweepFolder(out)._write_part(changed)
        (part,) = (out / "parts").iterdir()
        code, _, err = run_sim("results", out)
        assert words in err
        assert "Traceback" not in err
    assert run_sim("sweep", path, "--jobs", 1, "-q")[0] == 0  # replayed anew
    assert run_sim("results", out)[0] == 0
    write_parquet(pl.read_parquet(plan).drop("cell"), plan)
    code, _, err = run_sim("results", out)
    assert code == 2
    one_line(err, "has no column 'cell'")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("mass_mean", np.nan, "row 1: mass_mean is nan"),
        ("mass_mean", 1e22, "row 1: mass_mean is 1e+22; allowed: 0 to 1.05"),
        ("lost_lookup_peak", -1.0, "row 1: lost_lookup_peak is -1.0"),
        ("status", "fine", "row 1: status is 'fine'; allowed: ok, error"),
        ("policy", None, "row 1: policy is None; allowed: a value in every row"),
        ("policy_params", "{", "policy_params: not valid JSON"),
    ],
)
def test_rows_that_no_replay_wrote_are_not_ranked(
    trace_of_one, run_sim, tmp_path, suffix, column, value, words
):
    rows = simulator.replay(trace_of_one, ["rkv:buffer=5", "random:buffer=5"], [20])
    first = pl.int_range(pl.len()) == 0
    changed = pl.lit(value, rows.schema[column])
    rows = rows.with_columns(pl.when(first).then(changed).otherwise(pl.col(column)).alias(column))
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json" and value is not None and value != value:
        path.write_text(json.dumps(rows.to_dicts()))
        words = "nan found; allowed: finite"
    else:
        write_rows(rows, path, suffix)
    code, out, err = run_sim("results", path, "--metric", "mass_mean")
    assert (code, out) == (2, "")
    one_line(err, words)
