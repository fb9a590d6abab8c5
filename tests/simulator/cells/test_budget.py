"""The grammar of budgets, and what they buy."""

from __future__ import annotations

import polars as pl
import pytest

from simulator.budget import Budget, parse_budget
from simulator.cells import run_replay
from simulator.policies.language import parse_policy
from traces import InfeasibleBudgetError, ModelShape, UserError
from traces.documents import shown

SHAPE = ModelShape(4, 8, 2, 16, "float16")  # 8 KV heads in all, 64 bytes per entry


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("128", 128, "entries"),
        (128, 128, "entries"),
        (" 7 ", 7, "entries"),
        ("5%", 5, "%"),
        ("0.5%", 0.5, "%"),
        ("100%", 100, "%"),
        ("64MiB", 64, "MiB"),
        ("1.5 GB", 1.5, "GB"),
        ("900B", 900, "B"),
    ],
)
@pytest.mark.parametrize(("kind", "mark"), [("kept", ""), ("peak", "!"), ("on prompt", "+prompt")])
def test_budgets_are_read(text, amount, unit, kind, mark):
    budget = parse_budget(f"{text}{mark}" if mark else text)
    assert (budget.amount, budget.unit, budget.kind) == (amount, unit, kind)
    assert parse_budget(budget) is budget
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0.1",
            "1.0",
            "0",
            "-5",
            "120%",
            "0%",
            "5kg",
            "nan",
            "inf",
            "",
            " ",
            "%",
            "1e3",
            "5 5",
            "12mib",
            "٣",
            "!",
            "5!!",
            "5!+prompt",
            "5+prompt!",
            "5+",
            "5+promp",
            "+prompt",
            "0.1+prompt",
            "!5",
            "5!%",
            "0.1!",
            "120%!",
            "a\0b",
            "7" * 400,
        ),
        *(True, 0.1, None),
    ],
)
def test_what_is_no_budget_is_refused_in_words(text):
    with pytest.raises(UserError) as refusal:
        parse_budget(text)
    assert refusal.value.exit_code == 2
    message = str(refusal.value)
    assert "budget" in message
    assert shown(text.strip() if isinstance(text, str) else text) in message
    assert "\n" not in message


def test_bare_fraction_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"kept .*removed.* 10%"):
        parse_budget("0.1")


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("12", 12),
        ("5%", 50),
        ("0.19%", 1),
        ("100%", 1000),
        ("5120B", 10),
        ("5631B", 10),
        ("5632B", 11),
        ("1MiB", 2048),
        ("1MB", 1953),
        ("29%", 290),
        ("7%", 70),
    ],
)
def test_budgets_buy_whole_entries(text, entries):
    assert parse_budget(text).entries(SHAPE, 1000) == entries


@pytest.mark.parametrize("text", ["0.09%", "511B"])
def test_budget_that_buys_nothing_is_infeasible(text):
    with pytest.raises(InfeasibleBudgetError, match=text) as refusal:
        parse_budget(text).entries(SHAPE, 1000)
    assert refusal.value.exit_code == 5


def test_budget_is_a_frozen_value():
    assert Budget(5, "%") == Budget(5, "%")
    with pytest.raises(AttributeError):
        Budget(5).amount = 6


@pytest.mark.parametrize(("text", "tokens", "entries"), [("0.57%", 10_000, 57), ("1.13%", 10_000, 113)])
def test_shares_are_as_written_not_as_the_nearest_float(text, tokens, entries):
    assert parse_budget(text).entries(ModelShape(1, 1, 1, 8, "float16"), tokens) == entries


def test_budgets_that_differ_are_written_differently():
    texts = ["1000001B", "1000002B", "1234567", "0.5%", "64MiB", "64MiB!", "128!", "20%!"]
    assert [str(parse_budget(text)) for text in texts] == texts


@pytest.mark.parametrize("policy", ["rkv+utility:delta=4", "random", "snapkv+pyramid", "lagkv:lag=4"])
def test_a_budget_on_top_keeps_the_prompt_and_as_many_entries_beside(make_trace, rng, policy):
    trace = make_trace(n_tokens=90, prompt_tokens=30, values=rng.normal(size=(2, 2, 90, 8)))
    policies = [f"{policy}{',' if ':' in policy else ':'}buffer=4"]
    policies += [f"{policies[0]},protect={parse_policy(policies[0]).protection}+prompt"]
    on_top = run_replay([trace], policies[:1], ["20+prompt"], keep_retained=True)
    all_in = run_replay([trace], policies[1:], [50], keep_retained=True)
    row = on_top.table.row(0, named=True)
    assert (row["status"], row["budget_kind"], row["budget_entries"]) == ("ok", "on prompt", 50)
    # The same decisions as those of the policy that protects the prompt and is given both.
    places = ("layer", "kv_head", "compression", "slot", "position")
    assert on_top.retained.select(places).equals(all_in.retained.select(places))
    kept = on_top.retained.group_by("layer", "kv_head", "compression").agg(pl.col("position"))
    assert len(kept) > 10
    assert all(set(range(30)) < set(positions) for positions in kept["position"])
    assert row["policy_params"] == parse_policy(policies[0]).parameters_json
