"""``sim validate live``: tables, files, what goes on where it ended."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from verb_runs import PROBLEMS, one_line

from validate.live import matrix
from validate.live.completions import ROW_SCHEMA


def test_a_live_run_prints_accuracy_and_goes_on_where_it_ended(live, tmp_path, monkeypatch):
    code, out, err = live("-p", "rkv,random", "-b", "20,60%", "--batch", 2)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if "fullkv" in line or "r" in line.split()[:2]]
    assert "walk: 3 problems" in out
    assert len(re.findall(r"\bfullkv\b", out)) == 1
    assert len(re.findall(r"\brkv\b", out)) == len(re.findall(r"\brandom\b", out)) == 2
    assert lines
    assert len(list((tmp_path / "run" / "batches").iterdir())) == 2 * 5
    table = pl.read_csv(tmp_path / "run" / "accuracy.csv")
    assert table.select("policy", "budget_asked", "n_problems").rows() == [
        ("fullkv", None, 3),
        ("rkv", 20, 3),
        ("random", 20, 3),
        ("rkv", 60, 3),
        ("random", 60, 3),
    ]
    # Nothing is left to do: no process starts.
    monkeypatch.setattr(matrix, "processes", None)
    assert live("-p", "rkv,random", "-b", "20,60%", "--batch", 2) == (0, out, "")


@pytest.mark.slow
def test_live_rows_are_written_to_files(live, tmp_path):
    options = ["-p", "rkv", "-b", "20"]
    for name in ("rows.parquet", "rows.csv", "rows.json", "rows.txt"):
        code, out, err = live(*options, "-o", tmp_path / name)
        assert (code, out) == (0, "")
        assert re.fullmatch(rf"sim: wrote {tmp_path / name}: \d+ rows\n", err)
        assert live(*options, "-o", tmp_path / name, "-q") == (0, "", "")
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert list(rows.schema)[: len(ROW_SCHEMA)] == list(ROW_SCHEMA)
    assert rows["policy"].to_list() == ["fullkv"] * 3 + ["rkv"] * 3
    listed = json.loads((tmp_path / "rows.json").read_text())
    assert [row["token_ids"] for row in listed] == rows["token_ids"].to_list()
    assert pl.read_csv(tmp_path / "rows.csv").columns == [
        name for name in rows.columns if name != "token_ids"
    ]
    assert "walk: 3 problems" in (tmp_path / "rows.txt").read_text()
    code, out, _ = live(*options, "--format", "json")
    assert (code, json.loads(out)) == (0, listed)


def test_configurations_are_taken_from_a_file(live, tmp_path):
    configs = tmp_path / "winners.json"
    cells = [("rkv:alpha=0.2", "60%"), ("snapkv", 20), ("snapkv", "20")]
    configs.write_text(json.dumps([{"policy": policy, "budget": budget} for policy, budget in cells]))
    code, out, err = live("--configs", configs, "--format", "json")
    assert (code, err) == (0, "")
    found = [(row["policy"], row["budget_asked"], row["budget_unit"]) for row in json.loads(out)[::3]]
    assert found == [("fullkv", None, None), ("rkv", 60, "%"), ("snapkv", 20, "entries")]
    parameters = json.loads(json.loads(out)[3]["policy_params"])
    assert (parameters["alpha"], parameters["buffer"]) == (0.2, 4)


def test_samples_are_drawn_at_a_temperature(live):
    options = ["-p", "rkv", "-b", "20", "--samples", 2, "--temperature", 1.5, "--top-p", 0.9, "--seed", 4]
    code, out, _ = live(*options, "--limit", 2, "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["problem"], row["sample"]) for row in rows[:4]] == [
        (problem.id, sample) for problem in PROBLEMS[:2] for sample in (0, 1)
    ]
    assert len({tuple(row["token_ids"]) for row in rows[:4]}) == 4


@pytest.mark.parametrize(
    ("given", "n_tokens"), [([], 8), (["--stretch", 2], 16), (["--temperature", 0.01], 16)]
)
def test_a_text_under_eviction_may_be_longer_by_the_stretch(live, given, n_tokens):
    code, out, _ = live("-p", "rkv", "-b", "500", "--limit", 1, "--format", "json", *given)
    assert code == 0
    assert [row["n_tokens"] for row in json.loads(out)] == [8, n_tokens]


def test_batches_that_fail_leave_the_others(live):
    code, out, err = live("-p", "rkv,rkv+wave", "-b", "3,20", "--format", "json")
    assert code == 1
    assert [row["policy"] for row in json.loads(out)] == ["fullkv"] * 3 + ["rkv"] * 3
    lines = err.splitlines()
    assert "budget 3 entries" in lines[0]
    assert all(line.startswith("sim: ") for line in lines)
    assert lines[-1] == "sim: 3 batches failed, the others are written"


def test_a_live_run_with_infeasible_budgets_ends_as_a_replay_does(live):
    code, out, err = live("-p", "rkv", "-b", "3")
    assert code == 5
    assert "fullkv" in out
    assert err.splitlines()[-1] == "sim: all batches failed"
    for options in (("-p", "rkv", "-b", "3,20"), ("-p", "rkv,fullkv", "-b", "3")):
        code, _, err = live(*options)
        assert code == 1
        assert err.splitlines()[-1].endswith("failed, the others are written")


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(live, monkeypatch):
    run_batch, n_run = matrix._run_batch, []

    def interrupt_fourth(folder, batch):
        n_run.append(batch)
        if len(n_run) == 4:
            raise KeyboardInterrupt
        run_batch(folder, batch)

    monkeypatch.setattr(matrix, "_run_batch", interrupt_fourth)
    options = ["-p", "rkv,random", "-b", "3,20", "--jobs", 1]  # 3 entries are too few
    code, out, err = live(*options)
    assert (code, out) == (130, "")
    one_line(err, "interrupted with 1 of 5 batches done: the same command again goes on with the others")
    n_run.append(None)
    assert live(*options, "--format", "json")[0] == 1
    assert [batch.policy.name for batch in n_run[5:] if batch.budget.amount == 20] == ["rkv", "random"]


def test_a_folder_of_other_settings_is_refused(live):
    assert live("-p", "rkv", "-b", "20")[0] == 0
    code, out, err = live("-p", "rkv", "-b", "20", n=9)
    assert (code, out) == (2, "")
    one_line(err, "holds results of other settings: its live is", "allowed: another folder")
