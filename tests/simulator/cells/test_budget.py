"""The grammar of budgets, and what they buy."""

from __future__ import annotations

import pytest

from simulator.budget import Budget, parse_budget
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
@pytest.mark.parametrize("kind", ["kept", "peak"])
def test_budgets_are_read(text, amount, unit, kind):
    budget = parse_budget(text if kind == "kept" else f"{text}!")
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
