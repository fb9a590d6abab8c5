"""The tiers of tests: the quick one touches every room, and nothing is left to the nightly one alone."""

from __future__ import annotations

import ast

import pytest
from places import TESTS
from tiers import sampled

FOLDERS = sorted({path.parent for path in TESTS.rglob("test_*.py")})


def decorated(path):
    """Give the test functions of a file, each with its decorators."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, " ".join(map(ast.unparse, node.decorator_list))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_the_quick_tier_touches_every_folder(folder):
    marks = [marks for path in folder.glob("test_*.py") for _, marks in decorated(path)]
    assert any("mark.slow" not in own and "mark.cluster" not in own for own in marks)


def test_no_test_as_a_whole_is_nightly():
    found = [
        name for path in TESTS.rglob("test_*.py") for name, marks in decorated(path) if "nightly" in marks
    ]
    assert found == []


def test_a_sample_is_always_the_same_and_the_rest_is_nightly():
    first, again, other = (sampled(range(20), 5, seed=seed) for seed in (1, 1, 2))
    assert [case.values for case in first] == [(number,) for number in range(20)]
    drawn, same, others = (
        [case.values for case in cases if not case.marks] for cases in (first, again, other)
    )
    assert len(drawn) == 5
    assert drawn == same != others
    assert {mark.name for case in first for mark in case.marks} == {"nightly"}
