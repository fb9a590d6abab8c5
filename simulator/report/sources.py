"""What a page is made of: tables read from files, cut down to the policies and budgets that were asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from simulator.results.labels import asked_policies, is_policy, told_apart, with_budget_label
from simulator.results.store import scan_table
from traces.errors import UserError
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The tables of a page; in all of them policies of one name are told apart.

    Attributes
    ----------
    rows : polars.DataFrame
        Results of a replay.
    trajectory, retained : polars.DataFrame or None
        Budgets and mass over time, and who was retained.
    """

    rows: pl.DataFrame
    trajectory: pl.DataFrame | None
    retained: pl.DataFrame | None


def read_parquet(
    path: Path, schema: Mapping[str, Any], option: str, traces: Sequence[Trace] | None = None
) -> pl.DataFrame:
    """Read a table that ``sim replay`` wrote beside its rows.

    Parameters
    ----------
    path : Path
    schema : mapping
        Columns it has to have.
    option : str
        What the file was given by.
    traces : sequence of Trace, optional
        Only their rows; the rest, which may be far more than memory holds, is not read.

    Raises
    ------
    UserError
        If the file cannot be read or is damaged, lacks a column, or holds none of the traces.
    """
    scanned = scan_table(path, f"{option} {path}", schema)
    if traces is None:
        return scanned.collect()
    found = scanned.filter(pl.col("trace_id").is_in([trace.trace_id for trace in traces])).collect()
    if found.is_empty():
        names = ", ".join(trace.path.name for trace in traces[:3])
        raise UserError(f"{option} {path} has no row of --trace {names}; needed: the trace that was replayed")
    return found


def chosen(
    rows: pl.DataFrame,
    trajectory: pl.DataFrame | None,
    retained: pl.DataFrame | None,
    policies: Sequence[str],
    budgets: Sequence[str],
) -> Sources:
    """Tell policies apart and keep those asked for, at the budgets asked for; all where none is asked.

    Parameters
    ----------
    rows, trajectory, retained : polars.DataFrame or None
        Of one replay.
    policies : sequence of str
        As rows call them (``rkv``), or as the page does (``rkv:alpha=0.5``), globs, or with some parameters.
    budgets : sequence of str
        As they were asked: ``128``, ``20%``.

    Raises
    ------
    UserError
        If the rows have no such policy or budget.
    """
    # A table without rows has nothing to tell, and would be shown as one that was not given.
    trajectory, retained = (
        None if table is None or table.is_empty() else table for table in (trajectory, retained)
    )
    tables: list[pl.DataFrame] = [rows, *(table for table in (trajectory, retained) if table is not None)]
    plain = [table["policy"] for table in tables]
    tables = [with_budget_label(table) for table in told_apart(*tables)]
    wanted = asked_policies(policies, rows)
    _require(budgets, tables[0]["budget"], "--budget")
    kept = []
    for table, own in zip(tables, plain, strict=True):
        if policies:
            table = table.filter(is_policy(table, wanted, own))
        if budgets:
            table = table.filter(pl.col("budget").is_in(list(budgets)))
        kept.append(table.drop("budget"))
    if kept[0].is_empty():
        raise UserError("no row is of these policies at these budgets; allowed: a pair that was replayed")
    beside = iter(kept[1:])
    return Sources(
        kept[0],
        None if trajectory is None else next(beside),
        None if retained is None else next(beside),
    )


def _require(asked: Sequence[str], known: Iterable[str], option: str) -> None:
    there = list(dict.fromkeys(known))
    unknown = [name for name in asked if name not in there]
    if unknown:
        raise UserError(f"{option} is '{unknown[0]}'; the rows have: {', '.join(there)}")
