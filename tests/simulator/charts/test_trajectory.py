"""Budgets and mass over time: the spans cover the whole decode, and a figure shows them."""

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from agreement import make_wave

from simulator.cells import run_replay
from simulator.charts import head_budgets as charts
from simulator.results.output import write_parquet
from simulator.results.tables import GROUP, TRAJECTORY_SCHEMA

POLICIES = [
    "rkv+utility:buffer=5,delta=7",
    "reasonalloc:buffer=5,delta=1",
    "snapkv:trigger=every-n,interval=9",
    "random:buffer=6,prompt=wait",
    "fullkv",
]


@pytest.fixture
def replayed(make_trace):
    trace = make_trace(n_layers=3, n_tokens=90, prompt_tokens=30)
    wave = trace.path.parent / "wave.json"
    make_wave(trace, [1.0, 2.0, 3.0]).write(wave)
    return run_replay([trace], POLICIES, [14, "30%"], waves=[wave], keep_retained=True, keep_trajectory=True)


@pytest.fixture
def rows(replayed):
    def of(policy, budget=14, unit="entries"):
        return replayed.trajectory.filter(policy=policy, budget_asked=budget, budget_unit=unit)

    return of


def test_weighted_spans_average_to_the_mean_mass(replayed):
    assert dict(replayed.trajectory.schema) == TRAJECTORY_SCHEMA
    assert len(replayed.table) == 10
    for row in replayed.table.iter_rows(named=True):
        cell = {name: row[name] for name in ("trace_id", *GROUP)}
        spans = replayed.trajectory.filter(**cell).drop_nulls("mass")
        mass, steps = spans["mass"].to_numpy(), spans["n_steps"].to_numpy()
        assert np.average(mass, weights=steps) == pytest.approx(row["mass_mean"], abs=1e-6)
        assert set(spans.group_by("layer", "kv_head").agg(pl.col("n_steps").sum())["n_steps"]) == {60}


def test_every_compression_is_there_with_who_was_retained(replayed):
    keys = ["trace_id", *GROUP, "layer", "kv_head", "compression", "n_tokens"]
    held = replayed.retained.group_by(keys).len("n_entries").sort(keys)
    told = replayed.trajectory.drop_nulls("compression").select(*keys, pl.col("n_entries").cast(pl.UInt32))
    assert told.sort(keys).equals(held)


def test_a_compressed_prompt_ends_a_span_without_steps(rows):
    first = rows("rkv+utility").filter(compression=0)
    assert first["n_tokens"].unique().to_list() == [30]
    assert first["n_steps"].unique().to_list() == [0]
    assert first["mass"].null_count() == len(first) == 6
    waited = rows("random").filter(compression=0)
    assert waited["n_steps"].min() > 0
    # Nothing had been evicted in this span.
    assert waited["mass"].to_list() == [1.0] * 6


def test_the_last_span_ends_with_the_last_token(rows):
    last = rows("rkv+utility").filter(pl.col("compression").is_null())
    assert last.select("layer", "kv_head").rows() == [(i, h) for i in range(3) for h in range(2)]
    assert last["n_tokens"].unique().to_list() == [90]
    # Budgets sum to the layer's; the entries are those after the last compression and one per step since.
    assert last.group_by("layer").agg(pl.col("budget_entries").sum())["budget_entries"].to_list() == [28] * 3
    before = rows("rkv+utility").drop_nulls("compression").group_by("layer", "kv_head", maintain_order=True)
    grown = before.last()["n_entries"] + last["n_steps"]
    assert last["n_entries"].to_list() == grown.to_list()


def test_what_never_compresses_is_one_span_without_budget(rows):
    full = rows("fullkv")
    assert len(full) == 6
    assert full.select("n_steps", "n_entries", "mass").unique().rows() == [(60, 90, 1.0)]
    assert full["budget_entries"].null_count() == 6


def test_a_trajectory_is_kept_when_asked_only(make_trace):
    result = run_replay([make_trace()], ["rkv:buffer=5"], [12])
    assert len(result.trajectory) == 0
    assert dict(result.trajectory.schema) == TRAJECTORY_SCHEMA


def test_a_figure_has_a_panel_per_layer_and_a_line_per_head(rows):
    pytest.importorskip("altair")
    chart = charts.head_budgets(rows("reasonalloc")).to_dict()
    assert "reasonalloc" in chart["title"]["text"]
    assert chart["facet"]["sort"] == ["layer 0", "layer 1", "layer 2"]
    points = (
        next(iter(chart.get("datasets", {}).values())) if "datasets" in chart else chart["data"]["values"]
    )
    assert {(point["layer"], point["head"]) for point in points} == {
        (f"layer {layer}", head) for layer in range(3) for head in range(2)
    }
    assert {point["mean"] for point in points} == {14.0}
    assert max(point["tokens"] for point in points) == 90


@pytest.mark.slow
def test_figures_are_written_by_suffix(replayed, tmp_path, run_sim):
    pytest.importorskip("vl_convert")
    source = tmp_path / "t.parquet"
    write_parquet(replayed.trajectory, source)
    asked = [source, "--policy", "reasonalloc", "--budget", "30%"]
    for name, word in (("a.svg", b"<svg"), ("a.png", b"PNG"), ("a.html", b"<html")):
        assert run_sim("chart", *asked, "--out", tmp_path / name) == (0, f"wrote {tmp_path / name}\n", "")
        assert word in (tmp_path / name).read_bytes()[:400].lower() + (tmp_path / name).read_bytes()[:4]
    assert b"straight" in (tmp_path / "a.svg").read_bytes().lower()
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--policy is needed"),
        (["--policy", "rkvv"], "--policy is 'rkvv'; allowed: rkv+utility"),
        (["--policy", "reasonalloc"], "--budget is needed to choose one; allowed: 14, 30%"),
        (["--policy", "fullkv", "--budget", "14"], "never compressed"),
        (["--out", "a.pdf"], "allowed: .svg, .png, .html"),
        (["--out", "nowhere/a.svg"], "nowhere is missing"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_one_line(
    replayed, tmp_path, monkeypatch, run_sim, arguments, words
):
    pytest.importorskip("vl_convert")
    monkeypatch.chdir(tmp_path)
    write_parquet(replayed.trajectory, Path("t.parquet"))
    code, _, err = run_sim("chart", "t.parquet", "--out", "a.svg", *arguments)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_no_trajectory_is_refused(tmp_path, run_sim):
    (tmp_path / "text.parquet").write_text("no table")
    write_parquet(pl.DataFrame({"x": [1]}), tmp_path / "other.parquet")
    for name, words in (
        ("gone", "cannot be read"),
        ("text", "is damaged or no parquet file"),
        ("other", "no column 'trace_id'"),
    ):
        code, _, line = run_sim("chart", tmp_path / f"{name}.parquet", "--out", tmp_path / "a.svg")
        assert code == 2
        assert words in line
        assert len(line.splitlines()) == 1


def test_without_altair_the_figure_says_what_to_install(tmp_path, monkeypatch, run_sim):
    monkeypatch.setitem(sys.modules, "altair", None)
    code, _, err = run_sim("chart", tmp_path / "gone.parquet", "--out", tmp_path / "a.svg")
    assert code == 2
    assert "pip install 'kvbudget[plots]'" in err
