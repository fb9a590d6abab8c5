"""Rows are read back, and the standings at each budget are what resampling over traces says."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.report.sources import chosen
from simulator.results.metric_names import METRICS
from simulator.results.output import write_parquet
from simulator.results.standings import of_policies, standings
from simulator.sweep.rows import read_rows
from traces.errors import UserError

POLICIES = ["fullkv", "streamingllm:sinks=0,buffer=4", "streamingllm:buffer=4", "rkv:buffer=4"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    from traces import write_trace

    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("standings")
    for number in range(6):
        arrays = rng.normal(size=(1, 2, 60, 8)), rng.normal(size=(1, 1, 60, 8))
        task = {"family": "even" if number % 2 == 0 else "odd"}
        write_trace(folder / f"t{number}.kvtrace", *arrays, prompt_tokens=10, task=task)
    return run_replay([str(folder)], POLICIES, ["12", "30"]).table


@pytest.mark.parametrize("metric", METRICS)
def test_standings_are_means_and_paired_differences_over_traces(metric, table):
    found = standings(table, metric)
    assert len(found) == 3 * 2  # the full cache evicts nothing
    for (budget,), own in found.group_by("budget_asked"):
        rows = table.filter((pl.col("budget_asked") == budget) & (pl.col("policy") != "fullkv"))
        values = {
            key: group.sort("trace_id")[metric].to_numpy()
            for key, group in rows.group_by("policy", "policy_params")
        }
        pick = max if METRICS[metric].more_is_better else min
        best = pick(values, key=lambda key: values[key].mean())
        for row in own.iter_rows(named=True):
            key = row["policy"], row["policy_params"]
            assert row["n_traces"] == 6
            assert row["mean"] == pytest.approx(values[key].mean())
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["is_tied"] or key != best
            difference = values[key] - values[best]
            if (np.sign(difference) == np.sign(difference[0])).all() and difference.all():
                assert not row["is_tied"]  # worse on every trace


def test_memory_is_compared_with_the_median_policy(table):
    wide = table.with_columns(
        bytes_mean=pl.when(pl.col("policy") == "rkv").then(pl.col("bytes_mean") * 2).otherwise("bytes_mean")
    )
    found = standings(wide, "mass_mean")
    assert set(found.filter(pl.col("policy") != "rkv")["memory"]) == {0.0}
    assert found.filter(policy="rkv")["memory"].to_list() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_rows_come_back_from_every_format(suffix, table, tmp_path, run_sim):
    file = tmp_path / f"rows.{suffix}"
    write_parquet(table, tmp_path / "all.parquet")
    code, _, _ = run_sim("results", str(tmp_path / "all.parquet"), "-o", str(file))
    assert code == 0
    assert standings(read_rows([file]), "mass_mean").equals(standings(table, "mass_mean"))


def test_the_command_filters_and_prints(table, tmp_path, run_sim):
    file = tmp_path / "rows.parquet"
    write_parquet(table, file)
    code, out, _ = run_sim("results", str(file), "--metric", "lost_lookup_rate", "--family", "odd")
    assert code == 0
    assert "lost lookups (lost_lookup_rate, less is better) over 3 traces, buffer 4" in out
    assert "streamingllm:sinks=0" in out
    code, out, _ = run_sim(
        "results", str(file), "--metric", "mass_mean", "--policy", "rkv", "--format", "markdown"
    )
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0
    assert len(lines) == 3
    assert lines[2].startswith("| rkv:buffer=4 ")
    code, out, _ = run_sim("results", str(file))
    assert code == 0
    assert "fullkv" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "speed"], "--metric is 'speed'; allowed: lost_lookup_peak"),
        (["--policy", "h2o"], "--policy is 'h2o'; the rows have: fullkv, "),
        (["--family", "none"], "--family is 'none'; the rows have: even, odd"),
        (["--format", "markdown"], "--format markdown is for a terminal, with --metric"),
        (["--metric", "gap", "--policy", "fullkv"], "no row is of a policy that evicted"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(arguments, words, table, tmp_path, run_sim):
    file = tmp_path / "rows.parquet"
    write_parquet(table, file)
    code, _, errors = run_sim("results", str(file), *arguments)
    assert code == 2
    assert words in errors
    assert len(errors.splitlines()) == 1


def test_what_a_sample_cannot_tell_is_not_compared(table, tmp_path, run_sim):
    path = tmp_path / "rows.parquet"
    write_parquet(table.with_columns(pl.lit(None, pl.Float64).alias("lost_lookup_peak")), path)
    code, _, err = run_sim("results", path, "--metric", "lost_lookup_peak")
    assert code == 2
    assert "lost_lookup_peak is missing in 36 of 36 rows, as it is of samples; allowed" in err
    assert run_sim("results", path, "--metric", "mass_mean")[0] == 0


def test_rows_come_back_from_text_as_they_were(table, tmp_path, run_sim):
    for suffix in ("csv", "json", "parquet"):
        path = tmp_path / f"rows.{suffix}"
        write_parquet(table, path) if suffix == "parquet" else getattr(table, f"write_{suffix}")(path)
        found = read_rows([path])
        assert found.schema == table.schema
        assert found["mass_mean"].to_list() == pytest.approx(table["mass_mean"].to_list())
        assert run_sim("results", path)[0] == 0
    before = table.drop("mass_error", "sampling", "lost_lookup_peak", "budget_kind")
    write_parquet(before, tmp_path / "before.parquet")
    assert read_rows([tmp_path / "before.parquet"])["budget_kind"].unique().to_list() == ["kept"]
    assert run_sim("results", tmp_path / "before.parquet")[0] == 0


def test_rows_of_different_samples_are_not_mixed(table, tmp_path, run_sim):
    write_parquet(table, tmp_path / "whole.parquet")
    write_parquet(table.with_columns(sampling=pl.lit("queries=1/8")), tmp_path / "part.parquet")
    code, _, err = run_sim("results", tmp_path / "whole.parquet", tmp_path / "part.parquet")
    assert code == 2
    assert "measured in more than one way: everything; queries=1/8" in err


def test_one_trace_has_no_spread(table, tmp_path, run_sim):
    file = tmp_path / "rows.parquet"
    write_parquet(table.filter(pl.col("trace") == "t0.kvtrace"), file)
    code, out, _ = run_sim("results", str(file), "--metric", "mass_mean")
    assert code == 0
    assert "over 1 trace, buffer 4, no interval: one trace has no spread" in out
    assert "±" not in out
    assert " = " not in out


def test_rows_of_an_older_version_are_compared_by_what_they_have(table, tmp_path, run_sim):
    file = tmp_path / "rows.parquet"
    write_parquet(table.drop("lost_lookup_peak"), file)
    assert run_sim("results", str(file), "--metric", "mass_mean")[0] == 0
    code, _, errors = run_sim("results", str(file), "--metric", "lost_lookup_peak")
    assert code == 2
    assert "lost_lookup_peak is missing in 36 of 36 rows" in errors


def test_files_that_are_no_rows_are_refused(tmp_path):
    for name, content, words in (
        ("gone.parquet", None, "No such file"),
        ("rows.txt", b"", r"suffix is '\.txt'"),
        ("bad.parquet", b"PAR1", "damaged"),
        ("other.csv", b"a,b\n1,2\n", "no column 'trace_id'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_rows([tmp_path / name])


@pytest.mark.parametrize(
    ("asked", "n_rows"),
    [
        (["rkv"], 12),
        (["streamingllm"], 24),
        (["streamingllm:sinks=0"], 12),
        (["streamingllm:sinks=4"], 12),
        (["streamingllm:sinks=4,buffer=4"], 12),
        (["rkv:alpha=0.1"], 12),  # the only one has no parameters in its name, and these all the same
        (["rkv:buffer=4", "rkv"], 12),
        (["stream*"], 24),
        (["s*:sinks=0"], 12),
        (["r?v", "fullkv"], 24),
    ],
)
def test_policies_are_found_by_every_name_they_have(asked, n_rows, table):
    assert len(of_policies(table, asked)) == n_rows
    assert len(chosen(table, None, None, asked, []).rows) == n_rows


@pytest.mark.parametrize("asked", ["rkv:alpha=0.2", "rkvv", "x*", "rkv:alpha", "rkv:alpha=0.1,alpha=0.1"])
def test_a_policy_that_no_row_is_of_is_told_with_those_there_are(asked, table):
    for find in (lambda: of_policies(table, [asked]), lambda: chosen(table, None, None, [asked], [])):
        with pytest.raises(UserError, match=r"--policy is '.*; the rows have: .*streamingllm:sinks=0"):
            find()
