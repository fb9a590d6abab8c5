"""Our accuracy beside a published one, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from simulator.results.tables import budget_columns
from validate.live.accuracy import CELL, accuracy_table
from validate.protocol.file import Published

SCHEMA: dict[str, Any] = {
    "model": pl.String,
    "benchmark": pl.String,
    "policy": pl.String,
    "policy_params": pl.String,
    "budget_asked": pl.Float64,
    "budget_unit": pl.String,
    "budget_kind": pl.String,
    "n_problems": pl.Int64,
    "n_samples": pl.Int64,
    "accuracy": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "published": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "note": pl.String,
}


def beside_published(
    rows: pl.DataFrame, model: str, benchmark: str, published: Sequence[Published]
) -> pl.DataFrame:
    """Set the accuracy of every cell of one benchmark beside the published one.

    Parameters
    ----------
    rows : polars.DataFrame
        Of ``completions.ROW_SCHEMA``, whatever their families.
    model, benchmark : str
        As the table shall call them.
    published : sequence of Published
        Of this model and benchmark.

    Returns
    -------
    polars.DataFrame
        Columns of ``SCHEMA``, sorted by budget, the full cache first. Accuracies and differences are shares.
        ``low`` and ``high`` are the 95% bootstrap interval over problems; the difference's is the same less
        the published number, whose own error is not known.
    """
    known = {_key(own): own for own in published}
    found = []
    accuracy = accuracy_table(rows.with_columns(family=pl.lit(benchmark)))
    for row in accuracy.iter_rows(named=True):
        theirs = known.get(tuple(row[name] for name in CELL))
        own = {name: row[name] for name in (*CELL, "n_problems", "accuracy", "low", "high")}
        told: dict[str, float] = {}
        if theirs is not None:
            told = {
                "published": theirs.accuracy,
                "difference": row["accuracy"] - theirs.accuracy,
                "difference_low": row["low"] - theirs.accuracy,
                "difference_high": row["high"] - theirs.accuracy,
            }
        named = {"model": model, "benchmark": benchmark, "n_samples": rows["sample"].n_unique()}
        found.append(named | own | told | {"note": "" if theirs is None else theirs.note})
    table = pl.DataFrame(found, schema=SCHEMA)
    return table.sort("budget_asked", nulls_last=False, maintain_order=True)


def _key(own: Published) -> tuple[Any, ...]:
    """Give what tells a published cell from others, as `CELL` names it in rows."""
    return own.policy.name, own.policy.parameters_json, *budget_columns(own.budget).values()
