"""From rows of single texts to accuracy: per family, policy and budget, with intervals over problems."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from simulator.results.tables import BUDGET, GROUP, ROW_SCHEMA

CELL = tuple(GROUP)
CELL_SCHEMA = {name: ROW_SCHEMA[name] for name in CELL}
RESAMPLES = 2000
ALL_FAMILIES = "all"
DIFFERENCE_SCHEMA: dict[str, Any] = {
    "family": pl.String,
    **{name: CELL_SCHEMA[name] for name in BUDGET},
    "n_problems": pl.Int64,
    **dict.fromkeys(("difference", "low", "high"), pl.Float64),
}


def accuracy_table(rows: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Summarise rows of ``completions.ROW_SCHEMA``, per family and over all of them.

    Returns
    -------
    polars.DataFrame
        family and the columns of ``CELL``; n_problems; accuracy (pass@1: the mean over
        problems of each one's share of right texts) with its 95% bootstrap interval over problems, low and
        high; answered, ended and looping as shares of texts; tokens and diverged_at as means (of those that
        diverged); bytes_peak (largest) and bytes_mean.
    """
    if rows["family"].n_unique() > 1:
        rows = pl.concat([rows, rows.with_columns(family=pl.lit(ALL_FAMILIES))])
    rng = np.random.default_rng(seed)
    found = []
    for key, cell in rows.group_by("family", *CELL, maintain_order=True):
        solved = solved_shares(cell)["right"].to_numpy()
        low, high = mean_interval(solved, rng)
        found.append(
            dict(zip(("family", *CELL), key, strict=True))
            | {"n_problems": len(solved), "accuracy": float(solved.mean()), "low": low, "high": high}
            | cell.select(
                pl.col("answer").is_not_null().mean().alias("answered"),
                pl.col("ended").mean(),
                pl.col("loop_period").is_not_null().mean().alias("looping"),
                pl.col("n_tokens").mean().alias("tokens"),
                pl.col("diverged_at").mean(),
                pl.col("bytes_peak").max(),
                pl.col("bytes_mean").mean(),
            ).row(0, named=True)
        )
    return pl.DataFrame(found, infer_schema_length=None)


def solved_shares(cell: pl.DataFrame) -> pl.DataFrame:
    """Give each problem's share of right texts; columns problem, right, in order of the problems."""
    return cell.group_by("problem").agg(pl.col("right").cast(pl.Float64).mean()).sort("problem")


def compare(rows: pl.DataFrame, policy: str, other: str, seed: int = 0) -> pl.DataFrame:
    """Give the accuracy of one policy less another's, problem by problem, per family and budget.

    Returns
    -------
    polars.DataFrame
        family, the columns of ``results.BUDGET``, n_problems, difference, low, high (95%, bootstrap over
        problems).
    """
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    budgets = ["family", *BUDGET]
    both = rows.filter(pl.col("policy").is_in([policy, other]))
    for key, same in both.group_by(budgets, maintain_order=True):
        mine, theirs = (solved_shares(same.filter(policy=name)) for name in (policy, other))
        paired = mine.join(theirs, on="problem", suffix="_other")
        if paired.is_empty():
            continue
        difference = (paired["right"] - paired["right_other"]).to_numpy()
        low, high = mean_interval(difference, rng, lowest=-1.0)
        found.append(
            dict(zip(budgets, key, strict=True))
            | {"n_problems": len(paired), "difference": float(difference.mean()), "low": low, "high": high}
        )
    return pl.DataFrame(found, schema=DIFFERENCE_SCHEMA)


def mean_interval(values: np.ndarray, rng: np.random.Generator, lowest: float = 0.0) -> tuple[float, float]:
    """Give the 95% bootstrap interval of a mean of values from ``lowest`` to 1.

    A sample of equal values has no spread to resample, though its mean is not certain: Wilson's bound then.
    """
    if len(values) and (values == values[0]).all():
        bound = 1.96**2 / (len(values) + 1.96**2)
        return max(lowest, float(values[0]) - bound), min(1.0, float(values[0]) + bound)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
