"""What policies and budgets are called where people read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import polars as pl

from simulator.budget import KEPT, Budget
from simulator.policies.language import parse_parameters, split_name
from simulator.results.tables import BUDGET
from traces.errors import UserError
from traces.wording import near


def told_apart(*tables: pl.DataFrame) -> list[pl.DataFrame]:
    """Name policies of one name and several parameters by those in which they differ: ``rkv:alpha=0.2``."""
    given: dict[str, list[str]] = {}
    pairs = [
        pair for table in tables for pair in table.select("policy", "policy_params").unique().iter_rows()
    ]
    for name, params in sorted(set(pairs)):
        given.setdefault(name, []).append(params)
    labels = {}
    for name, several in given.items():
        read = [json.loads(params) for params in several]
        keys = dict.fromkeys(key for own in read for key in own)
        differing = [key for key in keys if any(own.get(key) != read[0].get(key) for own in read)]
        for params, own in zip(several, read, strict=True):
            told = ",".join(f"{key}={own[key]}" for key in differing if key in own)
            labels[name, params] = f"{name}:{told}" if told else name
    names = [[labels[key] for key in table.select("policy", "policy_params").iter_rows()] for table in tables]
    return [
        table.with_columns(policy=pl.Series(own, dtype=pl.String))
        for table, own in zip(tables, names, strict=True)
    ]


def asked_policies(asked: Iterable[str], rows: pl.DataFrame) -> set[tuple[str, str]]:
    """Return the policies of ``rows`` that were asked for, as pairs of name and parameters.

    Each is asked for by a name as rows or tables have it, a glob, or a name with some parameters,
    ``rkv:alpha=0.5``; raises UserError for one that stands for no policy.
    """
    (told,) = told_apart(rows)
    labels = dict(zip(rows.select("policy", "policy_params").iter_rows(), told["policy"], strict=True))
    found = set[tuple[str, str]]()
    for name in asked:
        own = {pair for pair, label in labels.items() if _is_asked(name, pair[0], pair[1], label)}
        if not own:
            known = list(dict.fromkeys(each for pair, label in labels.items() for each in (pair[0], label)))
            raise UserError(f"--policy is '{name}'{near(name, known)}; the rows have: {', '.join(known)}")
        found |= own
    return found


def with_parameters(text: str, parameters: Mapping[str, object]) -> str:
    """Append parameters to a written policy: ``rkv:alpha=0.2`` becomes ``rkv:alpha=0.2,buffer=32``."""
    written = ",".join(f"{name}={value}" for name, value in parameters.items())
    mark = "," if len(split_name(text)) < len(text) else ":"
    return f"{text}{mark}{written}" if written else text


def is_policy(
    rows: pl.DataFrame, policies: set[tuple[str, str]], names: pl.Series | None = None
) -> pl.Series:
    """Tell which rows are of some policies; ``names`` are theirs, where ``rows`` has others by now."""
    own = rows["policy"] if names is None else names
    return pl.Series(
        [pair in policies for pair in zip(own, rows["policy_params"], strict=True)], dtype=pl.Boolean
    )


def _is_asked(asked: str, policy: str, params: str, label: str) -> bool:
    if asked in (policy, label) or fnmatchcase(policy, asked) or fnmatchcase(label, asked):
        return True
    name = split_name(asked)
    try:
        given = parse_parameters(asked, asked[len(name) + 1 :])
    except UserError:
        return False
    known = json.loads(params)
    return fnmatchcase(policy, name) and all(known.get(key) == value for key, value in given.items())


def budget_label(amount: float | None, unit: str | None, kind: str | None = KEPT) -> str:
    """Write a budget as it was asked for; the full cache has none."""
    if amount is None:
        return "full"
    return str(Budget(amount, unit or "entries", kind or KEPT))


def with_budget_label(table: pl.DataFrame) -> pl.DataFrame:
    """Add ``budget``, as it was asked for, to a table with the columns ``BUDGET``."""
    asked = table.select(BUDGET).unique(maintain_order=True)
    labels = pl.Series("budget", [budget_label(*budget) for budget in asked.iter_rows()], dtype=pl.String)
    return table.join(
        asked.with_columns(labels), on=BUDGET, how="left", nulls_equal=True, maintain_order="left"
    )


def row_budget(row: Mapping[str, Any]) -> str:
    """Write the budget that a row of a table speaks of."""
    return budget_label(*(row[name] for name in BUDGET))
