"""What would change a result, or leave it as it was, without a word: it is refused, or said in one line."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from agreement import make_wave
from sweeps import write_spec

from simulator.cells import run_replay
from simulator.results.output import choose_format
from simulator.results.standings import standings
from simulator.results.tables import by_model, summarise
from traces import write_trace
from traces.errors import UserError


@pytest.fixture
def two_models(make_trace, rng, tmp_path):
    """Give traces of two models in one folder."""
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("one", "two"):
        arrays = rng.normal(size=(2, 4, 60, 8)), rng.normal(size=(2, 2, 60, 8))
        write_trace(folder / f"{name}.kvtrace", *arrays, prompt_tokens=20, model=name)
    return folder


@pytest.mark.slow
def test_a_table_is_of_one_model(two_models, run_sim, tmp_path):
    rows = tmp_path / "rows.parquet"
    options = ["--trace", two_models, "-p", "rkv,snapkv:window=4", "--buffer", 5, "-b", 12]
    code, out, _ = run_sim("replay", *options)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if " decode steps" in line] == [
        "one.kvtrace of one",
        "two.kvtrace of two",
    ]
    assert run_sim("replay", *options, "-o", rows)[0] == 0
    out = run_sim("results", rows, "--metric", "mass_mean")[1]
    assert [line for line in out.splitlines() if line in ("one:", "two:")] == ["one:", "two:"]
    code, out, _ = run_sim("results", rows, "--metric", "mass_mean", "--format", "csv")
    assert pl.read_csv(out.encode())["model"].to_list() == ["one", "one", "two", "two"]


def test_means_over_models_are_refused(two_models):
    table = run_replay([two_models], ["rkv:buffer=5", "random:buffer=5"], [12]).table
    for compare in (summarise, lambda rows: standings(rows, "mass_mean")):
        with pytest.raises(UserError, match="models one, two; allowed: of one model"):
            compare(table)
        for own in by_model(table):
            assert compare(own)["n_traces"].to_list() == [1, 1]


def test_a_report_is_of_one_model(two_models, run_sim, tmp_path):
    code, _, err = run_sim(
        "report", "--trace", two_models, "-p", "rkv", "--buffer", 5, "-b", 12, "--out", tmp_path / "r.html"
    )
    assert code == 2
    assert "of models one, two; allowed: of one model" in err


def test_a_budget_above_the_text_is_told_under_the_table(make_trace, run_sim, tmp_path):
    long, short = make_trace(n_tokens=90), make_trace(n_tokens=40)
    code, out, _ = run_sim(
        "replay", "-t", long.path, "-p", "fullkv,rkv,random", "--buffer", 5, "-b", "12,5000"
    )
    assert code == 0
    assert out.splitlines()[-1] == "At 5000 nothing was evicted by rkv, random: that is the full cache."
    _, out, _ = run_sim("replay", "-t", long.path, "-t", short.path, "-p", "rkv", "--buffer", 5, "-b", "50")
    assert (
        out.splitlines()[-1]
        == "At 50 nothing was evicted on 1 of 2 traces by rkv:buffer=5: that is the full cache."
    )
    rows = tmp_path / "rows.parquet"
    run_sim("replay", "-t", long.path, "-p", "rkv,random", "--buffer", 5, "-b", "12,5000", "-o", rows)
    out = run_sim("results", rows, "--metric", "mass_mean")[1]
    assert out.splitlines()[-1] == "At 5000 nothing was evicted by rkv, random: that is the full cache."
    rows = run_replay([long], ["rkv"], [5000]).table
    assert rows["n_evictions"].to_list() == [0]


@pytest.mark.parametrize("name", ["x.parquet", "x.json", "x.txt"])
def test_a_format_that_contradicts_the_file_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=rf"--format csv contradicts -o .*{name}, which is"):
        choose_format("csv", tmp_path / name)
    assert choose_format("csv", tmp_path / "x.csv") == choose_format("csv", tmp_path / "x.dat") == "csv"


@pytest.mark.slow
def test_tables_that_are_parquet_are_not_named_otherwise(make_trace, run_sim, tmp_path):
    trace = make_trace().path
    forced = ("validate", "forced")
    for verb, option in ((["replay"], "--retained"), (["replay"], "--trajectory"), (forced, "--steps")):
        code, _, err = run_sim(*verb, "-t", trace, "-p", "rkv", "-b", 12, option, tmp_path / "kept.csv")
        assert (code, err) == (
            2,
            f"sim: {option} {tmp_path / 'kept.csv'}: suffix is '.csv'; allowed: .parquet\n",
        )


def test_two_tables_are_not_written_to_one_file(run_sim, tmp_path):
    place = tmp_path / "x.parquet"
    code, _, err = run_sim("validate", "forced", "-t", "sample", "-o", place, "--steps", place)
    assert (code, err) == (2, f"sim: -o and --steps are both {place}; allowed: two files\n")


def test_a_wave_of_another_model_is_said_to_change_nothing(make_trace, run_sim, tmp_path):
    trace = make_trace()
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    make_wave(trace, [1.0, 2.0]).write(own)
    replace(make_wave(trace, [1.0, 2.0]), model="another").write(other)
    options = ["replay", "-t", trace.path, "-p", "rkv+wave", "--buffer", 5, "-b", 12, "--wave", own]
    assert run_sim(*options)[2] == ""
    code, _, err = run_sim(*options, "--wave", other)
    assert code == 0
    assert err == f"sim: wave {other} is of model 'another' and changes nothing for custom\n"
    spec = write_spec(
        tmp_path, traces=[str(trace.path)], policies=["rkv:buffer=5"], budgets=[12], waves=[str(other)]
    )
    code, _, err = run_sim("sweep", spec, "--jobs", 1, "-q")
    assert (code, err) == (0, f"sim: wave {other} is of model 'another' and changes nothing for custom\n")


def test_what_is_asked_twice_is_replayed_once(make_trace, run_sim):
    options = [
        "-p",
        "rkv,rkv",
        "--buffer",
        5,
        "-b",
        "20%,20%,20 %",
        "--format",
        "csv",
        "-t",
        make_trace().path,
    ]
    assert len(run_sim("replay", *options)[1].splitlines()) == 2


def test_a_buffer_that_no_policy_has_is_refused(make_trace, run_sim):
    options = ["replay", "-t", make_trace().path, "-b", 12, "--buffer", 5, "-p"]
    code, _, err = run_sim(*options, "rkv:trigger=per-step,fullkv")
    assert (code, "--buffer is 5, and no policy has a buffer" in err) == (2, True)
    assert run_sim(*options, "rkv:trigger=per-step,rkv")[0] == 0


def test_a_search_is_on_traces_of_one_model(two_models, make_trace, run_sim, tmp_path):
    asked = ["--trace", two_models, "--held-out", make_trace().path, "--out", tmp_path / "s", "-b", 12]
    code, _, err = run_sim("search", *asked)
    assert (code, err) == (2, "sim: traces are of models one, two, custom; allowed: of one model\n")


def test_a_glob_that_matches_nothing_among_several_is_refused(make_trace, run_sim, tmp_path):
    code, _, err = run_sim(
        "replay", "-t", make_trace().path, "-t", tmp_path / "none-*", "-p", "rkv", "-b", 12
    )
    assert (code, "none-*: matches no trace" in err) == (3, True)


def test_a_seed_that_draws_nothing_is_refused(make_trace, run_sim, tmp_path):
    rows = tmp_path / "rows.parquet"
    run_sim("replay", "-t", make_trace().path, "-p", "rkv", "--buffer", 5, "-b", 12, "-o", rows)
    code, _, err = run_sim("results", rows, "--seed", 3)
    assert (code, "--seed is given without --metric" in err) == (2, True)


def test_processes_beside_a_cluster_are_refused(make_trace, run_sim, tmp_path):
    spec = write_spec(tmp_path, traces=[str(make_trace().path)], policies=["rkv"], budgets=[12])
    code, _, err = run_sim("sweep", spec, "--engine", "ray", "--jobs", 2)
    assert (code, "--jobs is 2, and --engine ray has its own workers" in err) == (2, True)


def test_an_infeasible_budget_has_its_own_exit_code_in_every_verb(make_trace, run_sim, tmp_path):
    trace = make_trace().path
    asked = ["-b", "3", "--buffer", 5]
    assert run_sim("replay", "-t", trace, "-p", "rkv", *asked)[0] == 5
    assert run_sim("report", "-t", trace, "-p", "rkv", *asked, "--out", tmp_path / "r.html")[0] == 5
    search = ["--trace", trace, "--held-out", make_trace().path, "--out", tmp_path / "s", "--minutes", 0.01]
    code, _, err = run_sim("search", *search, "--against", "rkv", *asked)
    assert code == 5
    assert err.startswith("sim: rkv at 3: budget 3 entries per KV head is too small")
    assert len(err.splitlines()) == 1
