"""What policies and budgets are called where people read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from simulator.budget import KEPT, Budget
from simulator.results import BUDGET


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
