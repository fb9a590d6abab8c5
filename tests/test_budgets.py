"""Accuracy against budget: what a row says, what is not measured twice, what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from validate.reasoner import budgets
from validate.reasoner.evaluate import wilson_interval
from validate.reasoner.tasks import make_problem


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run the command on easy problems of the packaged reasoner; gives the rows in the file."""
    out = tmp_path / "budgets.jsonl"

    def measured(*arguments):
        easy = ["--count", "3", "--size", "5", "--length", "60", "--legs", "1", "--families", "walk"]
        monkeypatch.setattr(sys, "argv", ["budgets", *easy, "--buffer", "8", "--out", str(out), *arguments])
        budgets.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return measured


def test_the_whole_cache_answers_everything_and_ten_entries_nothing(measured):
    rows = measured("--policies", "fullkv,streamingllm,rkv", "--budgets", "100,12")
    found = {(row["policy"], row["budget_percent"]): row for row in rows}
    assert list(found) == [
        ("fullkv", 100),
        ("streamingllm", 100),
        ("rkv", 100),
        ("streamingllm", 12),
        ("rkv", 12),
    ]
    chains = [len(make_problem("walk", 1, i, 5, 60, legs=1).completion.split()) for i in range(3)]
    for policy in ("fullkv", "streamingllm", "rkv"):
        row = found[policy, 100]
        assert (row["right"], row["accuracy"], row["never_answered"]) == (3, 1, 0)
        assert row["mean_tokens"] == pytest.approx(sum(chains) / 3)  # the reference chain, word for word
        assert (row["low"], row["high"]) == wilson_interval(3, 3)
    assert found["streamingllm", 12]["right"] == 0


def test_points_in_the_file_are_not_measured_again(measured, monkeypatch):
    first = measured("--policies", "streamingllm", "--budgets", "50")
    monkeypatch.setattr(budgets, "load_model", lambda *_: None)
    assert measured("--policies", "streamingllm", "--budgets", "50") == first


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--families", "walk,stroll"], 2, "family 'stroll' is unknown; allowed: walk, program, machine"),
        (["--policies", "rvk"], 2, "'rvk' is unknown; allowed"),
        (["--seed", "0"], 2, "the training stream"),
        (["--size", "40"], 2, "size 40 is out of range; allowed: 4 to 20"),
        (["--policies", "rkv", "--budgets", "3"], 5, "too small for policy 'rkv'"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(measured, capsys, arguments, code, words):
    with pytest.raises(SystemExit) as ended:
        measured(*arguments)
    assert ended.value.code == code
    assert words in capsys.readouterr().err.splitlines()[-1]
