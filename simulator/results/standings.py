"""Policies compared at each budget by one number, and which differences are noise."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import polars as pl

from simulator.budget import Budget
from simulator.results.labels import asked_policies, is_policy
from simulator.results.metric_names import COMPARED, ESTIMATED, why_missing
from simulator.results.tables import BUDGET, GROUP, beside_best, budget_columns, comparable
from traces.errors import UserError


def at_budgets(table: pl.DataFrame, budgets: Sequence[Budget]) -> pl.DataFrame:
    """Keep the rows that were asked at some budgets; raises UserError for one that the rows lack."""
    asked = table.select(BUDGET).unique(maintain_order=True)
    known = [Budget(*columns) for columns in asked.iter_rows()]
    for budget in budgets:
        if budget not in known:
            raise UserError(f"--budget is '{budget}'; the rows have: {', '.join(map(str, known))}")
    wanted = pl.DataFrame(
        [tuple(budget_columns(budget).values()) for budget in budgets], schema=asked.schema, orient="row"
    )
    return table.join(wanted, on=asked.columns, how="semi", maintain_order="left")


def of_traces(table: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Keep the rows of traces by name or glob, with or without ``.kvtrace``.

    Raises UserError for one that no row is of.
    """
    if "trace" not in table.columns:
        raise UserError("--trace: the rows name no trace; allowed: rows of a version that writes it")
    known = table["trace"].drop_nulls().unique(maintain_order=True).to_list()
    wanted: set[str] = set()
    for name in names:
        found = {own for own in known if fnmatchcase(own, name) or fnmatchcase(own, f"{name}.kvtrace")}
        if not found:
            raise UserError(f"--trace is '{name}'; the rows have: {', '.join(known[:8])}")
        wanted |= found
    return table.filter(pl.col("trace").is_in(list(wanted)))


def of_policies(table: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Keep the rows of policies asked for as in `asked_policies`."""
    return table.filter(is_policy(table, asked_policies(names, table)))


def standings(table: pl.DataFrame, metric: str, *, seed: int = 0, resamples: int = 2000) -> pl.DataFrame:
    """Compare policies at each budget by one number, trace by trace.

    Parameters
    ----------
    table : polars.DataFrame
        Result rows.
    metric : str
        One of ``COMPARED``.
    seed, resamples : int
        Of the bootstrap over traces.

    Returns
    -------
    polars.DataFrame
        One row per policy, parameters and budget: ``n_traces``, ``mean`` and its 95% interval ``low`` to
        ``high``; ``memory``, the mean bytes over those of the budget's median policy, less 1; ``is_tied``,
        whether the paired interval of its distance to the budget's first policy holds 0. Policies that evict
        nothing are left out. Where some cells failed, a budget's rows average the traces that all its
        policies replayed.

    Raises
    ------
    UserError
        If rows of a sample cannot tell the metric.
    """
    done = comparable(table).filter(pl.col("n_evictions") > 0)
    if done[metric].null_count():
        whole = "" if metric in ESTIMATED else "rows of whole replays, or "
        raise UserError(
            f"{metric} is missing in {done[metric].null_count()} of {len(done)} rows, as it is "
            f"{why_missing(metric)}; allowed: {whole}another metric"
        )
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _, same_budget in done.group_by(GROUP[2:], maintain_order=True):
        groups = {key: own.sort("trace_id") for key, own in same_budget.group_by(GROUP, maintain_order=True)}
        # A policy that did not evict on some trace is compared on the traces that all share.
        shared = set.intersection(*(set(own["trace_id"]) for own in groups.values()))
        if not shared:
            continue
        values = {
            key: own.filter(pl.col("trace_id").is_in(shared))[metric].to_numpy()
            for key, own in groups.items()
        }
        choose = max if COMPARED[metric].more_is_better else min
        best = choose(values, key=lambda key: float(values[key].mean()))
        held = {key: float(own["bytes_mean"].to_numpy().mean()) for key, own in groups.items()}
        usual = float(np.median(list(held.values())))
        for key, (low, high, is_tied) in beside_best(values, best, rng, resamples).items():
            own = values[key]
            rows.append(
                dict(zip(GROUP, key, strict=True))
                | {"n_traces": len(own), "mean": float(own.mean()), "low": low, "high": high}
                | {"memory": held[key] / usual - 1, "is_tied": is_tied}
            )
    return pl.DataFrame(rows, infer_schema_length=None)
