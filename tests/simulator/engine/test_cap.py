"""A budget with ``!`` is a cap: what is held at a decode step never exceeds it, whatever the policy does."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import polars as pl
import pytest
from agreement import make_wave
from cases import MODERATE, cases
from hypothesis import given
from hypothesis import strategies as st

from simulator.budget import Budget, parse_budget
from simulator.cells import PreparedTrace, run_replay
from simulator.engine.cap import entries_of
from simulator.policies.language import Policy, parse_policy
from simulator.policies.layers.uniform import UniformLayers
from simulator.policies.parts import LayerAllocator, Trigger
from simulator.policies.triggers.buffer_full import BufferFull
from traces.errors import InfeasibleBudgetError


def replayed(trace, policy, budget):
    prepared = PreparedTrace(trace, oracle=False)
    return {"error": None} | prepared.replay(parse_policy(policy), budget, seed=0, waves={}).row


def cap_of(trace, amount, unit):
    """Give a cap of about ``amount`` entries per KV head, and what it is in entries of the whole cache."""
    heads = trace.shape.n_layers * trace.shape.n_kv_heads
    if unit == "B":
        return Budget(amount * heads * trace.shape.bytes_per_entry + 3, "B", "peak"), amount * heads
    if unit == "%":
        share = min(100, round(100 * amount / trace.total_tokens))
        return Budget(share, "%", "peak"), int(Fraction(share * trace.total_tokens * heads, 100))
    return Budget(amount, "entries", "peak"), amount * heads


@pytest.mark.slow
@MODERATE
@given(
    case=cases(kinds=("gaussian",), dynamic=True),
    amount=st.integers(2, 130),
    unit=st.sampled_from(["entries", "B", "%"]),
)
def test_what_is_held_never_exceeds_the_cap(case, amount, unit, shared_folder):
    trace = case.write(shared_folder)
    waves = {"custom": make_wave(trace, case.demand)}
    budget, most = cap_of(trace, amount, unit)
    prepared = PreparedTrace(trace, oracle=False)
    cell = prepared.replay(parse_policy(case.policy), budget, seed=0, waves=waves)
    row, heads = cell.row, case.n_layers * case.n_kv_heads
    # Refused for want of room, and never for having held too much.
    assert (row["budget_kind"], cell.exit_code) == ("peak", 0 if row["status"] == "ok" else 5)
    if row["status"] == "ok":
        assert round(row["entries_peak"] * heads) <= most
        assert row["bytes_peak"] <= most * trace.shape.bytes_per_entry


@pytest.mark.slow
@MODERATE
@given(case=cases(kinds=("gaussian",)), amount=st.integers(2, 100))
def test_one_more_entry_per_head_would_exceed_the_cap_where_heads_and_layers_share_alike(
    case, amount, shared_folder
):
    trace = case.write(shared_folder)
    named = parse_policy(case.policy)
    policy = Policy("even", scorer=named.scorer, trigger=named.trigger)
    prepared = PreparedTrace(trace, oracle=False)
    row = prepared.replay(policy, Budget(amount, kind="peak"), seed=0, waves={}).row
    if row["status"] != "ok" or row["n_evictions"] == 0 or row["entries_peak"] < amount:
        return  # the text ends before the cap is reached
    more = prepared.replay(policy, Budget(row["budget_entries"] + 1), seed=0, waves={}).row
    assert row["entries_peak"] == amount
    assert more["entries_peak"] == min(amount + 1, trace.total_tokens)


@pytest.mark.parametrize(
    ("trigger", "added"),
    [
        ("buffer=7", 7),
        ("trigger=every-n,interval=9", 9),
        ("trigger=per-step", 1),
        ("buffer=7,prompt=wait", 7),
        ("buffer=7,prompt=keep", 7),
    ],
)
def test_a_cap_leaves_room_for_what_is_added_between_compressions(trigger, added, make_trace):
    trace = make_trace(n_tokens=120)
    row = replayed(trace, f"rkv:{trigger}", parse_budget("40!"))
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["budget_entries"] == 40 - added
    assert row["entries_peak"] == 40


def test_a_cap_in_bytes_holds_the_buffer_inside(make_trace):
    trace = make_trace(n_tokens=120)
    most = 40 * 4 * trace.shape.bytes_per_entry
    kept, peak = (replayed(trace, "rkv:buffer=16", parse_budget(f"{most}B{mark}")) for mark in ("", "!"))
    assert (kept["bytes_peak"], peak["bytes_peak"]) == (56 * 4 * trace.shape.bytes_per_entry, most)
    assert (kept["budget_kind"], peak["budget_kind"]) == ("kept", "peak")


def test_a_cap_that_the_whole_text_fits_into_evicts_nothing(make_trace):
    for options in ("buffer=8", "trigger=segment,segment=5", "trigger=every-n,prompt=wait"):
        row = replayed(make_trace(), f"rkv:{options}", parse_budget("100%!"))
        assert (row["status"], row["n_evictions"], row["entries_peak"]) == ("ok", 0, 60)


def test_the_full_cache_stays_the_reference_under_a_cap(make_trace):
    row = replayed(make_trace(), "fullkv", parse_budget("30!"))
    assert (row["status"], row["entries_peak"]) == ("ok", 60)


@dataclass(frozen=True)
class Overshooting(LayerAllocator):
    name: ClassVar[str] = "overshooting"
    dynamic: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def allocate(self, request):
        return UniformLayers().allocate(request)


@dataclass(frozen=True)
class Unbounded(Trigger):
    name: ClassVar[str] = "unbounded"
    n: int = 3

    def next_compression(self, n_tokens, n_entries, total, n_kv_heads):
        return n_tokens + self.n


@dataclass(frozen=True)
class OnSomeTokens(BufferFull):
    name: ClassVar[str] = "on-some-tokens"

    def fires_on(self, token_ids):
        return token_ids % 7 == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("rkv:trigger=segment,segment=5", "nothing bounds.*trigger 'segment'; allowed: 60! or more"),
        ("rkv:buffer=32", "holds 30 entries.*adds 32.*protects 8; allowed: at least 41!"),
        ("rkv:buffer=4,prompt=keep", "protects 28, 20 of them the prompt; allowed: at least 33!"),
        ("rkv:buffer=4,prompt=wait", "prompt of 35 tokens waits until 36 are held; allowed: at least 36!"),
        ("rkv+wave-dynamic:trigger=every-n", "layers 'wave-dynamic' and trigger 'every-n'"),
        (Policy("x", parse_policy("rkv").scorer, trigger=Unbounded()), "nothing bounds.*trigger 'unbounded'"),
        (Policy("x", parse_policy("rkv").scorer, trigger=OnSomeTokens()), "trigger 'on-some-tokens'"),
        (Policy("x", parse_policy("rkv").scorer, layers=Overshooting()), "layers 'overshooting'"),
    ],
)
def test_a_cap_that_cannot_be_promised_is_infeasible_in_one_line(changed, words, make_trace):
    trace = make_trace(prompt_tokens=35 if "wait" in str(changed) else 20)
    with pytest.raises(InfeasibleBudgetError, match=words) as refusal:
        entries_of(parse_budget("30!"), parse_policy(changed), trace.shape, trace.prompt_tokens, 60)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 5


@dataclass(frozen=True)
class Understated(BufferFull):
    name: ClassVar[str] = "understated"

    def most_added(self, n_kv_heads):
        return n_kv_heads


def test_a_trigger_that_adds_more_than_it_says_fails_in_its_row(make_trace):
    policy = Policy("x", parse_policy("rkv").scorer, trigger=Understated(buffer=9))
    row = replayed(make_trace(), policy, parse_budget("30!"))
    assert row["status"] == "error"
    assert "held 152 entries under a cap of 120" in row["error"]


def test_a_longer_text_than_the_share_is_of_stays_under_the_cap(make_trace):
    shape, policy = make_trace().shape, parse_policy("rkv:buffer=8")
    assert entries_of(parse_budget("100%!"), policy, shape, 20, 60) == 60
    assert entries_of(parse_budget("100%!"), policy, shape, 20, 60, longest=66) == 52


def test_a_cap_and_a_budget_of_one_amount_are_two_budgets_of_a_table(make_trace):
    result = run_replay([make_trace()], ["rkv:buffer=4"], ["20", "20!", "20!"], keep_retained=True)
    assert result.table.select("budget_asked", "budget_unit", "budget_kind", "budget_entries").rows() == [
        (20.0, "entries", "kept", 20),
        (20.0, "entries", "peak", 16),
    ]
    counts = result.retained.group_by("budget_kind", "layer", "kv_head", "compression").len()
    assert counts.group_by("budget_kind").agg(pl.col("len").max()).sort("budget_kind").rows() == [
        ("kept", 20),
        ("peak", 16),
    ]
