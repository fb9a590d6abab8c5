"""What would silently break a rule of the replay is refused, in the cell or at the door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from simulator.budget import parse_budget
from simulator.cells import run_replay
from simulator.policies.language import Policy, parse_policy
from simulator.policies.parts import HeadAllocator, LayerAllocator, Scorer
from traces.errors import UserError


@dataclass(frozen=True)
class GivenHeads(HeadAllocator):
    name: ClassVar[str] = "given"
    shares: tuple[int, ...] = ()
    delta: int = 1

    def allocate(self, request):
        return np.array(self.shares), False


@dataclass(frozen=True)
class GivenLayers(LayerAllocator):
    name: ClassVar[str] = "given"
    shares: tuple[int, ...] = ()

    def allocate(self, request):
        return np.array(self.shares), False


def outcome_of(policy, budget, make_trace):
    """Replay beside a sound policy; give the status and error of the first and the status of the second."""
    table = run_replay([make_trace()], [policy, "rkv:buffer=4"], [budget]).table
    return table["status"][0], table["error"][0], table["status"][1]


# Each meets the total, of 2 heads or 2 layers at 12 entries of which 8 are protected.
@pytest.mark.parametrize("part", [GivenHeads((12, 12)), GivenLayers((12, 12)), GivenLayers((15, 9))])
def test_allocators_within_their_contract_are_carried_out(part, make_trace):
    role = "heads" if isinstance(part, HeadAllocator) else "layers"
    policy = replace(parse_policy("snapkv:buffer=4"), **{role: part})
    assert outcome_of(policy, 12, make_trace) == ("ok", None, "ok")


@pytest.mark.parametrize(
    "part",
    [
        GivenHeads((24, 0)),
        GivenHeads((17, 7)),
        GivenHeads((29, -5)),
        GivenHeads((24,)),
        GivenHeads((8, 8, 8)),
        GivenHeads((12.5, 11.5)),
        GivenLayers((27, -3)),
        GivenLayers((24,)),
        GivenLayers((8, 8, 8)),
    ],
)
def test_allocators_outside_their_contract_fail_their_cell_only(part, make_trace):
    role = "heads" if isinstance(part, HeadAllocator) else "layers"
    policy = replace(parse_policy("snapkv:buffer=4"), **{role: part})
    status, error, other = outcome_of(policy, 12, make_trace)
    assert (status, other) == ("error", "ok")
    assert "'given'" in error


def test_pyramid_that_leaves_a_layer_nothing_is_infeasible(make_trace):
    # One entry on average: 2 in the first layer, none in the last.
    policy = "streamingllm+pyramid+utility:sinks=0,delta=1,buffer=1"
    status, error, _ = outcome_of(policy, 1, make_trace)
    assert status == "error"
    assert "leaves layer 1 no entry" in error


def test_the_full_cache_cannot_be_made_to_evict():
    with pytest.raises(UserError, match="allowed: never"):
        parse_policy("fullkv:trigger=buffer-full,buffer=4")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "MiB"])
def test_budget_beyond_any_number_is_refused_in_words(text, make_trace):
    with pytest.raises(UserError):
        parse_budget(text).entries(make_trace().shape, 60)


@dataclass(frozen=True)
class Raising(Scorer):
    name: ClassVar[str] = "raising"

    def score(self, view):
        raise KeyError("no such thing")


def test_a_scorer_that_raises_fails_its_own_cell_only(make_trace):
    status, error, other = outcome_of(Policy("raising", Raising()), 12, make_trace)
    assert (status, other) == ("error", "ok")
    assert "scorer 'raising' raised KeyError" in error


def test_a_parameter_given_twice_is_refused():
    with pytest.raises(UserError, match="given twice"):
        parse_policy("rkv:alpha=0.1,alpha=0.9")


@pytest.mark.parametrize("option", [{"seed": -1}, {"jobs": 0}])
def test_options_out_of_range_are_refused_in_words(option, make_trace):
    with pytest.raises(UserError, match="allowed"):
        run_replay([make_trace()], ["rkv"], [12], **option)


def test_numpy_integers_are_budgets():
    assert parse_budget(np.int64(12)) == parse_budget("12")
