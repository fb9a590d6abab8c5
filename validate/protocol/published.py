"""Our accuracy beside a published one, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from simulator.results.tables import budget_columns
from validate.live.accuracy import CELL, CELL_SCHEMA, accuracy_table
from validate.protocol.file import Published

SCHEMA: dict[str, Any] = {
    "model": pl.String,
    "benchmark": pl.String,
    **CELL_SCHEMA,
    "n_problems": pl.Int64,
    "n_samples": pl.Int64,
    **dict.fromkeys(("accuracy", "low", "high", "published"), pl.Float64),
    **dict.fromkeys(("difference", "difference_low", "difference_high"), pl.Float64),
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
    theirs = pl.DataFrame(
        [
            {"policy": own.policy.name, "policy_params": own.policy.parameters_json}
            | budget_columns(own.budget)
            | {"published": own.accuracy, "note": own.note}
            for own in published
        ],
        schema={name: SCHEMA[name] for name in (*CELL, "published", "note")},
    )
    table = accuracy_table(rows.with_columns(family=pl.lit(benchmark))).cast(pl.Schema(CELL_SCHEMA))
    table = table.join(theirs, on=CELL, how="left", nulls_equal=True, maintain_order="left").with_columns(
        pl.lit(model).alias("model"),
        pl.lit(benchmark).alias("benchmark"),
        pl.lit(rows["sample"].n_unique()).alias("n_samples"),
        pl.col("note").fill_null(""),
        difference=pl.col("accuracy") - pl.col("published"),
        difference_low=pl.col("low") - pl.col("published"),
        difference_high=pl.col("high") - pl.col("published"),
    )
    table = table.select(*SCHEMA).cast(pl.Schema(SCHEMA))
    return table.sort("budget_asked", nulls_last=False, maintain_order=True)
