"""A parameter is declared once: its default, the values it may have, and how far a search may turn it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest

from simulator.policies.language import parse_policy
from simulator.policies.ranges import Limit, Range, at_least, between, one_of
from simulator.policies.scorers.rkv import RKV
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS, TRIGGERS
from traces.errors import UserError


@dataclass(frozen=True)
class WideRKV(RKV):
    """R-KV with a larger window."""

    window: int = 16


def test_a_subclass_with_another_default_keeps_limit_and_range():
    assert WideRKV().window == 16
    assert WideRKV.searched == RKV.searched
    with pytest.raises(ValueError, match="window is 0; allowed: 1 or more"):
        WideRKV(window=0)


def test_a_class_adds_to_the_ranges_of_its_base_and_leaves_those_as_they_are():
    assert list(RKV.searched) == ["window", "kernel_size", "group_reduce", "alpha", "similarity_threshold"]
    assert RKV.searched["alpha"] == Range(0.01, 1.0, log=True)
    assert list(SCORERS["snapkv"].searched) == ["window", "kernel_size", "group_reduce"]


@pytest.mark.parametrize("table", [SCORERS, LAYER_ALLOCATORS, HEAD_ALLOCATORS, TRIGGERS])
def test_what_is_searched_is_a_parameter(table):
    for part in table.values():
        assert set(part.searched) <= {item.name for item in fields(part)}


@pytest.mark.parametrize(
    ("limit", "allowed", "refused", "words"),
    [
        (at_least(1), [1, 2.5, math.inf], [0, 0.5, math.nan], "1 or more"),
        (at_least(1, finite=True), [1, 2.5], [0.5, math.inf, math.nan], "1 or more"),
        (between(-1, 0.5), [-1, 0, 0.5], [-1.1, 0.6, math.nan], "-1 to 0.5"),
        (one_of(("a", "b")), ["a", "b"], ["", "ab"], "a, b"),
    ],
)
def test_limits(limit: Limit, allowed, refused, words):
    assert all(limit.allows(value) for value in allowed)
    assert not any(limit.allows(value) for value in refused)
    assert limit.words == words


def test_of_two_wrong_parameters_the_first_is_named():
    with pytest.raises(UserError, match="window is 0"):
        parse_policy("rkv:no_match=row,alpha=2,window=0")
