"""Which answer a text gives and whether it is right; where it loops, and where it leaves another text."""

import json
import logging
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import UserError
from validate.problems import grading
from validate.problems.families import make_problem
from validate.problems.grading import (
    Grade,
    first_divergence,
    grade,
    graded,
    loop_period,
    require_grader,
)
from validate.problems.prompts import read_prompts

# Rows with the fields of AIME 2024 and MATH-500.
BENCHMARK_ROWS = [
    {"id": 60, "problem": "Find the remainder of $7^5$ modulo $1000$.", "answer": "807", "url": "none"},
    {"id": 61, "problem": "Let $xy=5^2$. Find $xy$.", "answer": "025", "url": "none"},
    {
        "problem": "Let $f(x)=\\frac{7x}{3}$. What is $f(2)$?",
        "answer": "\\frac{14}{3}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
]


@pytest.mark.parametrize("family", ["walk", "program", "machine"])
def test_a_chain_of_the_reasoner_is_right_in_exactly_its_words(family):
    problem = make_problem(family, 1, 0, size=4, length=60)
    assert grade(problem.completion, family, problem.answer) == Grade(problem.answer, True)
    assert grade(problem.completion + " T1", family, problem.answer) == Grade(problem.answer + " T1", False)
    assert grade("leg M1", family, problem.answer) == Grade(None, False)
    assert grade("answer 3 and then answer 4", family, "4") == Grade("4", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so it is \boxed{\frac{14}{3}}.", r"\frac{14}{3}"),
        (r"so it is \boxed{\frac{28}{6}}.", r"\frac{14}{3}"),
        (r"so it is 14/3", r"\frac{14}{3}"),
        (r"\boxed{14} as 7 + 7 is 14, not 15", "14"),
        (r"first 5, and then $x = 14$", "14"),
        (r"the answer is 073", "73"),
        (r"\boxed{73}", "073"),
        (r"\boxed{0.5}", r"\frac12"),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{-q + p}", "p - q"),
        (r"\boxed{36}", r"\$36"),
        (r"\boxed{\$36}", r"\$36"),
        (r"\boxed{\$32,\!348}", r"\$32,\!348"),
        (r"\boxed{6}", r"$6$"),
        (r"\boxed{6}", r"\boxed{6}"),
    ],
)
def test_the_same_mathematics_in_other_words_is_right(text, expected):
    assert grade(text, None, expected).right


@pytest.mark.parametrize(
    ("text", "expected", "answer"),
    [
        (r"\boxed{\frac{3}{14}}", r"\frac{14}{3}", r"\frac{3}{14}"),
        ("first 14, and then 5", "14", "5"),
        (r"14, no: \boxed{5}", "14", "5"),
        (r"\boxed{q - p}", "p - q", "q - p"),
        ("", "14", None),
        ("I do not know", "14", None),
    ],
)
def test_other_mathematics_is_wrong(text, expected, answer):
    assert grade(text, None, expected) == Grade(answer, False)


def test_an_unknown_family_is_mathematics():
    assert grade(r"\boxed{2/4}", "algebra", "1/2").right
    assert not grade("answer 1/2", "walk", "2/4").right


def test_rows_of_benchmarks_are_graded_by_their_answer(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in BENCHMARK_ROWS))
    prompts = read_prompts(path)
    assert [prompt.id for prompt in prompts] == ["60", "61", "test/algebra/1.json"]
    texts = [r"$7^4 = 2401$, so \boxed{807}", r"it is \boxed{25}", r"$\frac{7 \cdot 2}{3} = \frac{14}{3}$"]
    for prompt, text in zip(prompts, texts, strict=True):
        assert grade(text, prompt.family, prompt.answer).right
        assert not grade(r"\boxed{808}", prompt.family, prompt.answer).right


def test_what_takes_for_ever_to_compute_is_wrong_and_nothing_is_said(monkeypatch, caplog, capfd):
    monkeypatch.setattr(grading, "_SECONDS", 1)
    caplog.set_level(logging.WARNING)
    assert not grade(r"\boxed{9^{9^{9}}}", None, "14").right
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_mathematics_is_graded_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(grade(r"\boxed{2/4}", None, "1/2")))
    thread.start()
    thread.join()
    assert [own.right for own in found] == [True]


def test_without_math_verify_only_the_reasoner_is_graded(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"not installed; allowed: pip install 'kvbudget\[math\]'") as caught:
        grade("14", None, "14")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="math-verify"):
        require_grader(["walk", None])
    require_grader(["walk", "program", "machine"])
    assert grade("answer 14", "walk", "14").right


def slow_loop_period(tokens):
    """Try every period on the shortest tail that counts as a loop, token by token."""
    for period in range(1, 257):
        length = max(3 * period, 32)
        tail = tokens[len(tokens) - length :]
        if length <= len(tokens) and all(tail[i] == tail[i - period] for i in range(period, length)):
            return period
    return None


@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), min_size=1, max_size=24),
    st.integers(0, 40),
    st.integers(0, 23),
)
def test_a_loop_is_what_its_definition_says(head, cycle, rounds, cut):
    tokens = head + cycle * rounds + cycle[:cut]
    assert loop_period(tokens) == slow_loop_period(tokens)


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([], None),
        ([7] * 31, None),
        ([7] * 32, 1),
        ([7] * 32 + [8], None),
        (list(range(11)) * 3, 11),
        (list(range(11)) * 3 + [0, 1], 11),
        (list(range(11)) * 2 + list(range(10)), None),
        (list(range(256)) * 3, 256),
        (list(range(257)) * 3, None),
    ],
)
def test_a_loop_fills_32_tokens_in_three_rounds_of_256_at_most(tokens, period):
    assert loop_period(tokens) == period


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_texts_diverge_where_the_first_token_differs(mine, theirs):
    step = first_divergence(mine, theirs)
    if step is None:
        assert mine == theirs
    else:
        assert mine[:step] == theirs[:step]
        assert mine[step : step + 1] != theirs[step : step + 1]


def test_a_task_is_graded_by_its_family():
    task = {"id": "a", "family": "walk", "answer": "3 4"}
    right = graded(task, "so it gives 3 . answer 3 4")
    assert right == task | {"decoded_answer": "3 4", "correct": True}
    assert graded(task, "answer 3 4 5")["correct"] is False
    cut = graded(task, "it never ends")
    assert cut["decoded_answer"] is None
    assert cut["correct"] is False
    assert graded({"family": "walk"}, "answer 3") == {"family": "walk"}


def test_a_task_in_mathematics_is_graded_where_answers_can_be_compared(monkeypatch):
    task = {"id": "sum", "answer": "2"}
    assert graded(task, r"So it is $\boxed{\frac{4}{2}}$.") == task | {
        "decoded_answer": r"\frac{4}{2}",
        "correct": True,
    }
    assert graded(task, r"So it is $\boxed{3}$.")["correct"] is False
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    assert graded(task, r"$\boxed{2}$") == task
