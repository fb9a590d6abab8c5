"""What a page is made of: tables read from files, cut down to the policies and budgets that were asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The tables of a page, as `run_replay` makes them; in all, policies of one name are told apart."""

    rows: pl.DataFrame
    trajectory: pl.DataFrame | None = None
    retained: pl.DataFrame | None = None


def read_parquet(
    path: Path, schema: Mapping[str, Any], option: str, traces: Sequence[Trace] | None = None
) -> pl.DataFrame:
    """Read a table that ``sim replay`` wrote beside its rows, given by a command line's ``option``.

    Only rows of ``traces`` are read, if given: the others may be far more than memory holds. Raises UserError
    if the file cannot be read or is damaged, lacks a column of ``schema``, or holds none of the traces.
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
    """Tell policies of a replay apart and keep those asked for, at the budgets asked for; all if none is.

    Policies are asked for as in `asked_policies`, budgets as in the replay: ``128``, ``20%``. Raises
    UserError if the rows lack one.
    """
    given = {"trajectory": trajectory, "retained": retained}
    # A table without rows has nothing to tell, and would be shown as one that was not given.
    filled = {name: table for name, table in given.items() if table is not None and not table.is_empty()}
    tables = {"rows": rows} | filled
    named = dict(zip(tables, map(with_budget_label, told_apart(*tables.values())), strict=True))
    wanted = asked_policies(policies, rows)
    known = named["rows"]["budget"].unique(maintain_order=True).to_list()
    unknown = [budget for budget in budgets if budget not in known]
    if unknown:
        raise UserError(f"--budget is '{unknown[0]}'; the rows have: {', '.join(known)}")
    kept = {}
    for name, table in named.items():
        if policies:
            table = table.filter(is_policy(table, wanted, tables[name]["policy"]))
        if budgets:
            table = table.filter(pl.col("budget").is_in(list(budgets)))
        kept[name] = table.drop("budget")
    if kept["rows"].is_empty():
        raise UserError("no row is of these policies at these budgets; allowed: a pair that was replayed")
    return Sources(**kept)
