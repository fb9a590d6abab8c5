"""``sim reasoner``: problems as JSONL, accuracy of a model, figures of stored tables."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from places import ROOT
from verb_runs import one_line

from validate.problems.families import LEG_COUNTS, LENGTHS, SIZES, make_problem


@pytest.fixture
def problems(run_sim):
    return lambda *options: run_sim("reasoner", "problems", *options)


def test_problems_are_written_as_jsonl(problems):
    options = ["--family", "mixed", "--count", "4", "--size", "5-7", "--length", "120", "--seed", "4"]
    code, out, err = problems(*options, "--care", "2", "--legs", "1-2", "--slip-rate", "0.5")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["family"] for row in rows] == ["walk", "program", "machine", "walk"]
    for index, row in enumerate(rows):
        problem = make_problem(row["family"], 4, index, (5, 7), 120, 2, (1, 2), 0.5)
        assert row == {**asdict(problem), "slips": list(problem.slips)}
    assert len({row["id"] for row in rows}) == 4


def test_problems_need_no_options(problems):
    row = json.loads(problems("--count", "1")[1])
    assert row["prompt"] == make_problem("walk", 1, 0).prompt


def test_help_tells_the_ranges_that_problems_are_drawn_from(problems):
    _, out, _ = problems("--help")
    for first, last in (SIZES, LENGTHS, LEG_COUNTS):
        assert f"({first}-{last})" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--family", "maze"], "--family is 'maze'; allowed: walk, program, machine, mixed"),
        (["--size", "3"], "size 3 is out of range; allowed: 4 to 20"),
        (["--size", "four"], "--size is 'four'; allowed: a number, or two such as 8-16"),
        (["--size", "12-8"], "size 12-8 is out of range"),
        (["--length", "39"], "length 39 is out of range"),
        (["--length", "500-9000"], "length 500-9000 is out of range"),
        (["--care", "3"], "care 3 is out of range"),
        (["--legs", "0-2"], "legs 0-2 is out of range"),
        (["--legs", "-"], "--legs is '-'"),
        (["--legs", "9" * 5000], "allowed: a number"),
        (["--slip-rate", "2"], "slip_rate 2.0 is out of range"),
        (["--seed", "-1"], "--seed is -1"),
        (["--count", "many"], "valid integer"),
    ],
)
def test_problems_that_cannot_be_made_are_one_line(problems, arguments, words):
    code, out, err = problems(*arguments)
    assert (code, out) == (2, "")
    one_line(err, words)


def test_a_model_is_evaluated_family_by_family(run_sim, folder, tmp_path):
    place = tmp_path / "accuracy.json"
    model = ["--model", folder / "tiny", "--size", "4", "--length", "40-60", "--legs", "1", "--count", 2]
    code, out, err = run_sim("reasoner", "evaluate", *model, "--json", place)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["walk", "program", "machine"]
    assert all(
        "float32: 0/2 exact (0.0%, 95% interval 0.0% to 65.8%; 2 decoded)" in line for line in lines[:3]
    )
    rows = json.loads(place.read_text())
    assert [(row["right"], row["decoded"], row["size"]) for row in rows] == [(0, 2, [4, 4])] * 3
    shipped = json.loads((ROOT / "validate/reasoner/weights/accuracy-float32.json").read_text())
    assert list(rows[0]) == list(shipped[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "0"], "--seed is 0, the training stream; allowed: any other"),
        (["--count", "0"], "--count is 0; allowed: 1 or more"),
        (["--size", "99"], "size 99 is out of range"),
        (["--json", "/none/a.json"], "--json /none/a.json: folder /none is missing"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run_sim, folder, options, words):
    code, out, err = run_sim("reasoner", "evaluate", "--model", folder / "tiny", *options)
    assert (code, out) == (2, "")
    one_line(err, words)


def test_what_is_known_of_every_number_is_written(run_sim, tmp_path):
    place = tmp_path / "fidelity.json"
    assert run_sim("reasoner", "trust", "--out", place) == (0, f"wrote {place}\n", "")
    assert place.read_text() == (ROOT / "simulator/results/fidelity.json").read_text()
