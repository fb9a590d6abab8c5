"""A part of what ``tests/tools/fuzz.py`` tries, on every run: 300 changes of what is read from outside."""

from __future__ import annotations

import pytest
from fuzz import fuzz
from fuzz_targets import make_targets

CHANGES = 300
KINDS = (
    *("manifest", "tensors", "tokens", "tensors, resealed"),
    *("wave", "sweep", "configs", "prompts", "head shares"),
    *("rows.parquet", "rows.csv", "rows.json", "trajectory", "retained"),
    *("sweep part", "sweep plan", "live part"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    found = {target.name: target for target in make_targets(tmp_path_factory.mktemp("fuzz"))}
    assert tuple(found) == KINDS
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_mean_what_they_say(targets, kind):
    target = targets[kind]
    assert target.meaning(target.path) == target.expected(target.sound)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_refused_in_a_line_or_means_what_it_should(targets, kind):
    tally = fuzz(targets[kind], range(-(-CHANGES // len(KINDS))), seed=1)
    assert not tally.wrong
    assert tally.counts["refused"] > 0
