"""``sim validate live --simulated --report``: answers beside what a replay foretold."""

from __future__ import annotations

import json
import re
import sys

import polars as pl
import pytest
from browser import open_page
from spies import NAME
from verb_runs import RIGHT, one_line

import validate.live
from simulator.results.output import write_parquet
from validate.live.accuracy import accuracy_table
from validate.live.fidelity import LIVE_HALF, METRICS, best_metric


@pytest.mark.slow
def test_answers_are_compared_with_what_the_simulator_said(live, answering, simulated, tmp_path):
    report = tmp_path / "report.html"
    options = ["-p", ",".join(RIGHT), "-b", "20,30", "--simulated", simulated]
    code, out, err = live(*options, "--report", report)
    assert (code, err) == (0, f"sim: wrote {report}: 3 charts\n")
    assert re.search(r"20\s+rkv\s+0\.667\s", out)
    assert "walk: what predicts accuracy, 6 cells of 3 problems, 2 traces" in out
    fidelity = pl.read_csv(tmp_path / "run" / "fidelity.csv")
    assert set(fidelity["metric"]) == {*METRICS, LIVE_HALF}
    row = fidelity.row(by_predicate=pl.col("metric") == "mass_mean", named=True)
    assert f"{row['spearman']:.3f}" in out
    replayed = pl.read_parquet(simulated).group_by("policy", "budget_asked").agg(pl.col("mass_mean").mean())
    regrets = [
        2 / 3 - RIGHT[own.sort("mass_mean")["policy"][-1]] / 3 for _, own in replayed.group_by("budget_asked")
    ]
    assert row["regret"] == pytest.approx(sum(regrets) / 2)
    page = report.read_text(encoding="utf-8")
    best = best_metric(fidelity)
    shown = json.loads(re.search(r'id="report-data">(.*?)</script>', page)[1])["figures"]
    assert list(shown) == [
        "accuracy-walk",
        "predictors-spearman_within",
        "predictors-spearman",
        *(f"accuracy-{metric}-walk" for metric in dict.fromkeys([best, "mass_mean"])),
    ]
    assert all(f'data-figure="{name}"' in page for name in shown)
    pictures = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "run").glob("*.svg")}
    assert sorted(pictures) == ["accuracy", "predictors", "scatter"]
    words = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<link|(src|href)\s*=|@import", words)
    assert all(name in pictures["accuracy"] and name in str(shown["accuracy-walk"]) for name in RIGHT)
    assert "full cache 100%" in pictures["accuracy"]
    assert "full cache 100%" in str(shown["accuracy-walk"])
    for told in ("66.7%", "33.3%", "0.0%", "100.0%", "3 problems, 3 policies, 2 budgets", best):
        assert told in words
    assert "At 20, 30 rkv answers most (66.7%, 66.7% right)" in words
    assert "Command: sim validate live --model" in words.partition("<footer>")[2]
    # With rows in a file, what predicts them is still told.
    code, out, _ = live(*options, "-o", tmp_path / "rows.parquet")
    assert (code, "what predicts accuracy" in out) == (0, True)
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert accuracy_table(rows).select("policy", "accuracy").rows()[:3] == [
        ("fullkv", 1.0),
        ("rkv", pytest.approx(2 / 3)),
        ("streamingllm", pytest.approx(1 / 3)),
    ]


@pytest.mark.slow
def test_one_policy_alone_is_reported_though_nothing_is_compared(live, answering, simulated, tmp_path):
    options = ["-p", "rkv", "-b", "20", "--simulated", simulated, "--report", tmp_path / "report.html"]
    code, out, err = live(*options)
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'report.html'}: 3 charts\n")
    assert "1 cell of 3 problems" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Accuracy, two correlations, and against the best predictor and retained mass.
    assert page.count('class="plot"') == 5
    # There is nothing to correlate, and a page's data know no other word for it.
    assert "NaN" not in re.search(r'id="report-data">(.*?)</script>', page)[1]


@pytest.mark.slow
def test_the_report_opens_in_a_browser(live, answering, simulated, tmp_path):
    live("-p", ",".join(RIGHT), "-b", "20,30", "--simulated", simulated, "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for width in (1280, 390):
        seen = open_page(page, tmp_path, width)
        assert seen.faults == []
        assert len(seen.marks) == page.count('class="plot"')
        assert seen.smallest >= 11


def test_policies_at_different_budgets_are_reported(live, tmp_path):
    configs = tmp_path / "configs.json"
    configs.write_text('[{"policy": "rkv", "budget": "20"}, {"policy": "rkv+utility", "budget": "30"}]')
    code, _, err = live("--configs", configs, "--report", tmp_path / "report.html")
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'report.html'}: 1 chart\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('class="plot"') == 1


def test_parameters_tell_policies_of_one_name_apart(live, tmp_path):
    code, out, _ = live("-p", "rkv,rkv:alpha=0.9", "-b", "20", "--report", tmp_path / "report.html")
    assert code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("rkv:alpha=0.1", "rkv:alpha=0.9"):
        assert name in out
        assert name in page


def test_a_report_without_its_packages_is_refused(live, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "validate.live.charts", raising=False)
    monkeypatch.delattr(validate.live, "charts", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    code, _, err = live("-p", "rkv", "-b", "20", "--report", tmp_path / "report.html")
    assert code == 2
    one_line(err, "pip install 'kvbudget[plots]'")


def test_a_replay_of_several_models_is_refused(live, simulated):
    rows = pl.read_parquet(simulated)
    write_parquet(pl.concat([rows, rows.with_columns(model=pl.lit("another"))]), simulated)
    code, _, err = live("-p", "rkv", "-b", "20", "--simulated", simulated)
    assert code == 2
    one_line(err, f"--simulated {simulated} holds rows of another, {NAME}; allowed: one model's")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("text", "other.parquet is damaged or no parquet file"),
        (pl.DataFrame({"a": [1]}), "other.parquet has no column 'trace_id'"),
        ("metrics", "other.parquet has no column 'mass_mean'"),
    ],
)
def test_what_is_no_replay_is_refused_before_anything_is_decoded(live, simulated, tmp_path, table, words):
    path = tmp_path / "other.parquet"
    if isinstance(table, pl.DataFrame):
        write_parquet(table, path)
    elif table == "metrics":
        rows = pl.read_parquet(simulated)
        write_parquet(rows.drop("mass_mean"), path)
    else:
        path.write_text("trace_id,family\n")
    code, out, err = live("--simulated", path)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


def test_a_replay_of_other_policies_is_refused(live, simulated):
    code, _, err = live("-p", "snapkv", "-b", "20", "--simulated", simulated)
    assert code == 2
    one_line(err, "no family, policy and budget is in both")
