"""A benchmark's problems, from files and URLs, asked as the template says."""

from __future__ import annotations

import json
import sys
from io import BytesIO

import polars as pl
import pytest
from verb_runs import PROBLEMS

from traces.errors import UserError
from validate.problems.prompts import read_prompts
from validate.protocol.prompts import prepare_prompts


def prepared(source, tmp_path, template="{problem}"):
    return prepare_prompts("math", str(source), template, tmp_path / "prompts")


def test_problems_are_asked_as_the_template_says(tmp_path):
    row = {"problem": r"What is $\frac{1}{2}$ of {problem}?", "answer": "½", "unique_id": "test/a.json"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,) = read_prompts(prepared(tmp_path / "p.jsonl", tmp_path, "Solve: {problem}\nin \\boxed{}."))
    assert found.text == "Solve: " + row["problem"] + "\nin \\boxed{}."
    assert (found.id, found.answer, found.family) == ("test/a.json", "½", "math")


def test_problems_of_a_family_keep_it(saved, tmp_path):
    found = read_prompts(prepared(saved / "problems.jsonl", tmp_path))
    assert [(own.family, own.text) for own in found] == [("walk", own.prompt) for own in PROBLEMS]


@pytest.mark.slow
def test_a_url_is_read_once_and_kept(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    rows = pl.DataFrame({"id": [60, 61], "problem": ["one", "two"], "answer": ["033", "204"], "year": [1, 2]})
    buffer = BytesIO()
    rows.write_parquet(buffer)
    fsspec.filesystem("memory").pipe("/aime/train.parquet", buffer.getvalue())
    url = "memory://aime/train.parquet"
    expected = [("60", "one", "033"), ("61", "two", "204")]
    assert [(own.id, own.text, own.answer) for own in read_prompts(prepared(url, tmp_path))] == expected
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert [(own.id, own.text, own.answer) for own in read_prompts(prepared(url, tmp_path))] == expected
    with pytest.raises(UserError, match=r"needs fsspec, .* pip install 'kvbudget\[remote\]'"):
        prepared("memory://aime/other.parquet", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "none.jsonl",
            "benchmark 'math': its prompts 'none.jsonl' cannot be read: No such file",
        ),
        ("memory://none/p.jsonl", "memory://none/p.jsonl cannot be read: FileNotFoundError"),
        ("nothing://p.jsonl", "nothing://p.jsonl cannot be read: ValueError: Protocol not known"),
        ("bad.parquet", "bad.parquet cannot be read: no Parquet"),
        ("bare.jsonl", "bare.jsonl, line 1: no answer"),
        ("text.jsonl", "text.jsonl, line 1: not valid JSON"),
    ],
)
def test_problems_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, source, words):
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bare.jsonl").write_text('{"problem": "one"}\n')
    (tmp_path / "text.jsonl").write_text("one\n")
    with pytest.raises(UserError) as refused:
        prepared(source, tmp_path)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    if "cannot be read" in words:
        assert "allowed: --prompts math=FILE.jsonl" in str(refused.value)
