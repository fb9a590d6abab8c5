"""Names that a terminal would act on, numbers that nothing has: shown as they are, or refused in a line."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.engine.demand import calibrate
from traces.errors import TraceError, UserError
from validate.problems.prompts import parse_prompts


@pytest.fixture
def rows(make_trace):
    return run_replay([make_trace()], ["rkv:window=4,buffer=4", "random:buffer=4"], [12]).table


@pytest.mark.parametrize("options", [[], ["--metric", "mass_mean"]])
def test_brackets_in_names_are_no_markup(rows, run_sim, tmp_path, options):
    named = rows.with_columns(policy=pl.lit("[/bold][red]mine"), trace=pl.lit(":smile:"))
    named.head(1).write_csv(tmp_path / "rows.csv")
    code, out, _ = run_sim("results", tmp_path / "rows.csv", *options)
    assert code == 0
    assert "[/bold][red]mine" in out


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        ("policy", "\x1b[31mred", "no control characters"),
        ("trace", "a\nb", "no control characters"),
        ("budget_asked", float("inf"), "a number above 0"),
        ("budget_asked", float("nan"), "a number above 0"),
        ("budget_asked", -5.0, "a number above 0"),
        ("budget_unit", "furlongs", "entries, %, "),
        ("budget_kind", "zzz", "kept, peak"),
        ("n_steps", 0, "1 or more"),
    ],
)
def test_rows_of_no_replay_are_refused(rows, run_sim, tmp_path, column, value, allowed):
    rows.with_columns(pl.lit(value).cast(rows.schema[column]).alias(column)).write_csv(tmp_path / "rows.csv")
    code, out, err = run_sim("results", tmp_path / "rows.csv")
    assert (code, out) == (2, "")
    assert f"row 1: {column} is " in err
    assert f"allowed: {allowed}" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["model", "model_revision", "family"])
def test_a_manifest_names_nothing_that_moves_a_cursor(make_trace, name):
    told = {"task": {"family": "\x1b[2J"}} if name == "family" else {name: "a\x1b[2J"}
    with pytest.raises((TraceError, UserError, ValueError), match=name):
        make_trace(**told)


def test_a_problem_names_no_family_that_moves_a_cursor():
    line = json.dumps({"prompt": "one", "family": "\x1b[31m"})
    with pytest.raises(
        UserError, match=r"line 1: family is .*; allowed: a string without control characters"
    ):
        parse_prompts(line.encode(), "p.jsonl")


def test_an_unchecked_trace_of_another_scale_gives_no_wave(make_trace, rng):
    queries, keys = rng.normal(size=(2, 4, 60, 8)), rng.normal(size=(2, 2, 60, 8))
    lse = np.zeros((2, 4, 60), np.float32)
    trace = make_trace(arrays=(queries, keys), lse=lse)
    with pytest.raises(TraceError, match=r"weights of layer 0 sum to .*; allowed: 1"):
        calibrate([trace], check=False)


@pytest.mark.parametrize("verb", [["results"], ["report", "--out", "page.html"]])
def test_a_folder_that_is_not_there_is_not_taken_for_a_suffix(run_sim, verb):
    code, _, err = run_sim(verb[0], "nothere", *verb[1:])
    assert code == 2
    assert "nothere: cannot be read: No such file or directory" in err


@pytest.mark.parametrize("options", [["--total-tokens", 99999999999], ["--layers", 10**9]])
def test_a_trace_that_no_disk_holds_is_not_begun(run_sim, tmp_path, options):
    code, _, err = run_sim("trace", "make", tmp_path / "a.kvtrace", *options)
    assert code == 2
    assert "bytes; allowed: the " in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--minutes", "nan"), ("--minutes", "inf"), ("--trials", 0)])
def test_a_search_of_no_length_is_refused(run_sim, tmp_path, option, value):
    asked = ["--trace", "sample", "--held-out", "sample", "--budget", "20%", "--out", tmp_path / "out"]
    code, _, err = run_sim("search", *asked, option, value)
    assert code == 2
    assert f"{option} is {value}; allowed: " in err


def test_no_memory_left_is_one_line(run_sim, monkeypatch):
    monkeypatch.setattr(
        "simulator.cells.run_replay", lambda *_, **__: (_ for _ in ()).throw(MemoryError("9 GiB"))
    )
    code, _, err = run_sim("replay", "--trace", "sample", "--policy", "rkv", "--budget", "20%")
    assert (code, err) == (1, "sim: there is not enough memory: 9 GiB\n")


@pytest.mark.parametrize(
    ("option", "value"), [("--max-new-tokens", 10**20), ("--batch", 2**31), ("--stretch", "inf")]
)
def test_counts_beyond_all_measure_are_refused(run_sim, tmp_path, option, value):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "answer": "two"}\n')
    asked = ["--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", option, value]
    code, _, err = run_sim("validate", "live", *asked)
    assert code == 2
    assert f"{option} is {value}; allowed: 1 to 2,147,483,647" in err
    assert not (tmp_path / "out").exists()
