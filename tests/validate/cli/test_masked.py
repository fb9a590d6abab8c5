"""``sim validate masked``: the divergence of what a replay retains."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from spies import NAME
from verb_runs import one_line

from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from validate.levels import cells
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


def test_rows_are_a_replays_with_the_divergence_beside(level, trace, run_sim, tmp_path):
    rows, replayed = tmp_path / "rows.json", tmp_path / "replayed.json"
    assert level("masked", "-p", "rkv,snapkv,fullkv", "-o", rows)[0] == 0
    asked = ["-p", "rkv,snapkv,fullkv", "-b", "20", "--buffer", 6, "-o", replayed]
    assert run_sim("replay", "--trace", trace.path, *asked)[0] == 0
    for own, of_replay in zip(*(json.loads(path.read_text()) for path in (rows, replayed)), strict=True):
        same = own.keys() & of_replay.keys() - {"code_version"}
        assert own["code_version"].startswith(of_replay["code_version"])
        assert {"mass_mean", "bytes_mean", "lost_lookup_peak", "status", "model"} < same
        assert {name: own[name] for name in same} == pytest.approx({name: of_replay[name] for name in same})
    code, out, _ = run_sim("results", rows, "--metric", "kl_mean", "--format", "json")
    assert code == 0
    assert [row["mean"] for row in json.loads(out)] == [
        row["kl_mean"] for row in json.loads(rows.read_text())
    ][:2]
    code, out, _ = run_sim("results", rows, "--metric", "kl_mean")
    assert "divergence of predictions, mean (kl_mean, less is better)" in out
    assert "is measured, by sim validate, on the traces' own model" in out


@pytest.mark.parametrize("name", ["masked", "forced"])
def test_an_interrupted_level_goes_on_in_its_folder(level, name, tmp_path, monkeypatch):
    out, rows = tmp_path / "out", tmp_path / "rows.json"
    assert level(name, "-p", "rkv", "--out", out, "-o", rows)[0] == 0
    (file,) = out.glob("*.parquet")
    before, first = file.read_bytes(), json.loads(rows.read_text())
    # Nothing is run again: not even the full cache's predictions are there to compare with.
    with monkeypatch.context() as patched:
        patched.setattr(cells, "baseline_of", lambda model, trace: 1 / 0)
        assert level(name, "-p", "rkv", "--out", out, "-o", rows)[0] == 0
    assert (file.read_bytes(), json.loads(rows.read_text())) == (before, first)
    assert level(name, "-p", "snapkv,rkv", "--out", out, "-o", rows)[0] == 0
    assert json.loads(rows.read_text())[1:] == first
    file.write_bytes(before[:-100])
    code, _, err = level(name, "-p", "rkv", "--out", out, "-o", rows)
    assert code == 0
    assert "its cells are run again" in err
    assert json.loads(rows.read_text())[0] == pytest.approx(first[0])
    code, _, err = level(name, "-p", "rkv", "--out", out, "--seed", 1)
    assert code == 2
    one_line(err, "its seed is 0, asked 1; allowed: another folder")


def test_a_folder_takes_cells_that_fail_and_rows_of_other_code(level, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rows = tmp_path / "rows.json"
    assert level("masked", "-p", "rkv,h2o", "--out", out, "-o", rows, budget="20,3")[0] == 1
    first = json.loads(rows.read_text())
    with monkeypatch.context() as patched:
        # A cell that cannot be is told without the full cache.
        patched.setattr(cells, "baseline_of", lambda model, trace: 1 / 0)
        assert level("masked", "-p", "rkv,h2o", "--out", out, "-o", rows, budget="20,3")[0] == 1
    assert json.loads(rows.read_text()) == first
    (file,) = out.glob("*.parquet")
    old = pl.read_parquet(file)
    write_parquet(old.with_columns(code_version=pl.lit("older"), kl_mean=pl.lit(9.0)), file)
    assert level("masked", "-p", "rkv", "--out", out, "-o", rows)[0] == 0
    assert json.loads(rows.read_text())[0]["kl_mean"] == pytest.approx(first[0]["kl_mean"])
    # What was not asked for again is kept, and says which code wrote it.
    kept = dict(pl.read_parquet(file).select("policy", "kl_mean").iter_rows())
    assert kept == {"rkv": pytest.approx(first[0]["kl_mean"]), "h2o": 9.0}


def test_rows_of_two_levels_are_not_compared(level, run_sim, tmp_path):
    for name in ("masked", "forced"):
        assert level(name, "-p", "rkv", "-o", tmp_path / f"{name}.json")[0] == 0
    code, _, err = run_sim(
        "results", tmp_path / "masked.json", tmp_path / "forced.json", "--metric", "kl_mean"
    )
    assert code == 2
    one_line(err, "rows are of several levels: masked, forced; allowed: files of one level")
    code, _, err = run_sim("results", tmp_path / "masked.json", "--metric", "forced_mass")
    one_line(err, "has no column 'forced_mass'; allowed: rows of sim validate masked or forced")


def test_where_nothing_is_evicted_means_are_shown_as_well(level, trace, folder):
    (other,) = set(folder.glob("*.kvtrace")) - {trace.path}
    code, out, err = level("masked", "-p", "rkv", "--trace", other, budget="500")
    assert code == 0, err
    assert re.search(r"rkv +500 +1\.000 .* 0\.000 ±0\.000", out)


def test_of_several_traces_means_are_shown_with_intervals(level, trace, folder, tmp_path):
    (other,) = set(folder.glob("*.kvtrace")) - {trace.path}
    rows = tmp_path / "rows.json"
    code, out, _ = level("masked", "-p", "rkv,streamingllm,fullkv", "--trace", other, "-o", rows)
    assert code == 0
    code, out, _ = level("masked", "-p", "rkv,streamingllm,fullkv", "--trace", other)
    assert "Means over 2 traces; the mean divergence with its 95% interval" in out
    for policy in ("rkv", "streamingllm"):
        found = [row["kl_mean"] for row in json.loads(rows.read_text()) if row["policy"] == policy]
        told = re.search(rf"{policy} +20 .* (\d\.\d{{3}}) ±(\d\.\d{{3}}) ", out)
        assert float(told[1]) == pytest.approx(sum(found) / 2, abs=6e-4)
        # Drawn from two numbers, means lie anywhere between them.
        assert float(told[2]) == pytest.approx(abs(found[0] - found[1]) / 2, abs=6e-4)
    assert re.search(r"fullkv +20 +1\.000 .* 0\.000 ±0\.000", out)


def test_a_foreign_trace_is_one_line(run_sim, folder, make_trace):
    named = ["--model", folder / NAME, "--trace", make_trace(head_dim=16).path, "--device", "cpu"]
    code, _, said = run_sim("validate", "masked", *named, "-p", "rkv,h2o", "-b", "20", "--buffer", 6)
    assert code == 2
    one_line(said, "allowed: the model the trace was recorded from")
