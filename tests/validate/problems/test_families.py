"""The problem families against slow solvers, and the command that writes them."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_families import SOLVERS

from validate.problems.families import (
    CARE,
    FAMILIES,
    LENGTHS,
    MAX_LENGTH,
    MAX_SIZE,
    MIN_LENGTH,
    MIN_SIZE,
    answer_of,
    make_problem,
    split_into_legs,
)

CHECKED_EVERY = {"care0": 0, "care1": 5, "care2": 2}
RECAPPED_EVERY = {"care0": 0, "care1": 10, "care2": 10}
CHECK = re.compile(r"(\S+) (\S+) check \1 (\S+) (ok|fix)")
RECAP = re.compile(r"recap ([^.]*) \. ")
sizes, lengths = st.integers(MIN_SIZE, MAX_SIZE), st.integers(MIN_LENGTH, MAX_LENGTH)
families, cares = st.sampled_from(list(FAMILIES)), st.none() | st.integers(0, 2)
legs = st.none() | st.integers(1, 8)
MANY = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def lines_of(text, found):
    """Give the number of the line that each match in a chain belongs to."""
    return [int(re.findall(r"#(\d+) ", text[: each.start()])[-1]) for each in found]


def without_care(problem):
    """Take checks and recaps out of a chain, having proved each of them."""
    text, care = problem.completion, problem.prompt.split()[-2]
    _, _, recaps = SOLVERS[problem.family](problem.prompt)

    found, every = list(RECAP.finditer(text)), RECAPPED_EVERY[care]
    assert len(found) == text.split().count("recap")
    said = list(zip(lines_of(text, found), [each[1] for each in found], strict=True))
    assert said == [(line, recap) for line, recap in recaps if every and line % every == 0]

    checks, every = list(CHECK.finditer(text)), CHECKED_EVERY[care]
    assert len(checks) == text.split().count("check")
    assert lines_of(text, checks) == [line for line, _ in recaps if every and line % every == 0]
    for each in checks:
        assert (each[2] == each[3]) == (each[4] == "ok")
    slips = [text[: each.start(2)].count(" ") for each in checks if each[4] == "fix"]
    assert tuple(slips) == problem.slips
    return RECAP.sub("", CHECK.sub(r"\1 \3", text))


@MANY
@given(families, sizes, lengths, cares, legs, st.integers(0, 2**62), st.sampled_from([0.0, 0.12, 1.0]))
def test_chains_and_answers_agree_with_an_independent_solver(
    family, size, length, care, legs, index, slip_rate
):
    problem = make_problem(family, 1, index, size, length, care, legs, slip_rate)
    chain, answer, _ = SOLVERS[family](problem.prompt)
    assert without_care(problem) == chain
    assert problem.answer == answer_of(problem.completion) == answer
    if care is not None:
        assert problem.prompt.split()[-2] == CARE[care]


@MANY
@given(families, sizes, lengths, cares, legs, st.integers(0, 2**62))
def test_slips_change_neither_the_prompt_nor_what_is_true(family, size, length, care, legs, index):
    asked = (family, 1, index, size, length, care, legs)
    right, wrong = make_problem(*asked), make_problem(*asked, slip_rate=1.0)
    assert (right.id, right.prompt, right.answer) == (wrong.id, wrong.prompt, wrong.answer)
    assert right.slips == ()
    words, slipped = right.completion.split(), wrong.completion.split()
    assert len(wrong.slips) == words.count("check") == slipped.count("fix")
    differ = {i for i, (a, b) in enumerate(zip(words, slipped, strict=True)) if a != b}
    corrections = {i for i, word in enumerate(slipped) if word == "fix"}
    assert differ == corrections | set(wrong.slips)


def test_the_slip_rate_is_the_share_of_checked_lines():
    problems = [make_problem("program", 1, index, care=2, slip_rate=0.12) for index in range(60)]
    n_checks = sum(problem.completion.split().count("check") for problem in problems)
    assert 0.08 < sum(len(problem.slips) for problem in problems) / n_checks < 0.16


@given(st.integers(4, 220), legs, st.integers(0, 2**32))
@MANY
def test_legs_have_2_to_60_lines(lines, wanted, seed):
    found = split_into_legs(np.random.default_rng(seed), lines, wanted)
    assert sum(found) == lines
    assert all(2 <= each <= 60 for each in found)
    assert 1 <= len(found) <= 8
    if wanted is not None and 4 * wanted <= lines <= 45 * wanted:
        assert len(found) == wanted


@pytest.mark.parametrize("size", [MIN_SIZE, 11, MAX_SIZE])
@pytest.mark.parametrize("family", FAMILIES)
def test_size_counts_places_instructions_or_rules(family, size):
    words = make_problem(family, 1, 0, size).prompt.split()
    found = {
        "walk": words.count(";")
        - words.count("dead")
        - sum(word.istitle() for word in words[: words.index("legs")]),
        "program": sum(bool(re.fullmatch(r"R\d+", word)) for word in words),
        "machine": words.count(";"),
    }
    assert found[family] == size


@pytest.mark.parametrize("family", FAMILIES)
def test_default_prompts_are_short_and_chains_as_long_as_asked(family):
    errors = []
    for index in range(300):
        length = LENGTHS[0] + index * (LENGTHS[1] - LENGTHS[0]) // 299
        problem = make_problem(family, 1, index, length=length)
        prompt, chain = len(problem.prompt.split()), len(problem.completion.split())
        assert prompt <= (prompt + chain) / 4
        errors.append(chain / length - 1)
    # Chains come in whole lines, which are longer where there are dead ends, jumps and checks.
    assert max(map(abs, errors)) < 0.15
    assert abs(sum(errors) / len(errors)) < 0.06


def test_streams_are_fixed_by_their_arguments_and_differ_between_seeds():
    for family in FAMILIES:
        assert make_problem(family, 1, 0) == make_problem(family, 1, 0)
        prompts = {make_problem(family, seed, index).prompt for seed in range(5) for index in range(5)}
        assert len(prompts) == 25


def test_a_range_is_drawn_from_ends_included():
    problems = [make_problem("machine", 1, index, (5, 7), 60) for index in range(40)]
    assert {problem.id.split("-")[1] for problem in problems} == {"n5", "n6", "n7"}
    assert {problem.prompt.split()[-2] for problem in problems} == set(CARE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "maze"}, "family 'maze' is unknown; allowed: walk, program, machine"),
        ({"size": MIN_SIZE - 1}, f"size 3 is out of range; allowed: {MIN_SIZE} to {MAX_SIZE}"),
        ({"size": MAX_SIZE + 1}, "size .* is out of range"),
        ({"size": (8, MAX_SIZE + 1)}, "size .* is out of range"),
        ({"size": (9, 8)}, r"size 9-8 is out of range"),
        ({"length": MIN_LENGTH - 1}, f"length 39 is out of range; allowed: {MIN_LENGTH} to {MAX_LENGTH}"),
        ({"length": MAX_LENGTH + 1}, "length .* is out of range"),
        ({"care": -1}, "care -1 is out of range; allowed: 0 to 2"),
        ({"care": 3}, "care 3 is out of range"),
        ({"legs": 0}, "legs 0 is out of range; allowed: 1 to 8"),
        ({"legs": (3, 9)}, "legs .* is out of range"),
        ({"slip_rate": -0.1}, "slip_rate.*allowed: 0 to 1"),
        ({"slip_rate": 1.5}, "slip_rate.*allowed: 0 to 1"),
    ],
)
def test_refuses_what_it_cannot_make(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_problem(**{"family": "walk", "seed": 1, "index": 0} | settings)
    assert "\n" not in str(caught.value)


def test_answer_of_a_text_without_answer_is_none():
    assert answer_of("#3 so from ba be . #2") is None
