"""Prompts that ship: where they are found, and what they hold."""

from __future__ import annotations

import pytest

from traces.errors import UserError
from validate.problems.grading import grade
from validate.problems.prompts import read_prompts
from validate.problems.sets import SETS, prompts_file


def test_a_set_is_found_by_its_name_and_a_file_by_its_path(tmp_path, monkeypatch):
    assert prompts_file("gsm8k-400").name == "gsm8k-400.jsonl"
    monkeypatch.chdir(tmp_path)
    assert prompts_file("mine.jsonl") == prompts_file(prompts_file("mine.jsonl"))
    (tmp_path / "math-500").write_text('{"prompt": "1 + 1"}\n')
    assert prompts_file("math-500").resolve() == tmp_path / "math-500"
    with pytest.raises(UserError, match=r"--prompts is 'gsm8k'.*allowed: a JSONL file, aime-2024, code-20"):
        prompts_file("gsm8k")


@pytest.mark.parametrize("name", SETS)
def test_sets_are_whole(name):
    prompts = read_prompts(prompts_file(name))
    assert len(prompts) == int({"aime-2024": "30"}.get(name, name.rpartition("-")[2]))
    has_answers = name not in ("code-20", "prose-20")
    assert all((prompt.answer is not None) == has_answers for prompt in prompts)
    assert all(("\\boxed{}" in prompt.text) == has_answers for prompt in prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aime-2024", "gsm8k-400", "math-500"])
def test_every_answer_can_be_read_by_the_grader(name):
    """Boxed, as a model is asked to give it, it is right; and another answer is wrong."""
    prompts = read_prompts(prompts_file(name))[::7]
    wrong = [own.id for own in prompts if not grade(f"So $\\boxed{{{own.answer}}}$.", None, own.answer).right]
    assert not wrong
    assert not any(grade(r"So $\boxed{-987654}$.", None, own.answer).right for own in prompts)
