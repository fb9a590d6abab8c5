"""The part of a replay's page that tells how well its numbers predict accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from simulator.charts.style import ordered_policies
from simulator.report.page import Section
from simulator.results.metric_names import METRICS
from simulator.results.store import read_table
from simulator.results.tables import refuse_rows, with_budget_kind
from traces.errors import UserError
from validate.live.accuracy import ALL_FAMILIES, CELL, CELL_SCHEMA
from validate.live.charts import METRIC_NAMES, scatter_figures
from validate.live.fidelity import Cells, ranked_metrics

_FIDELITY = {
    **{"family": pl.String, "metric": pl.String},
    **{"spearman": pl.Float64, "spearman_within": pl.Float64, "regret": pl.Float64},
}
_ACCURACY = {
    "family": pl.String,
    **{name: kind for name, kind in CELL_SCHEMA.items() if name != "budget_kind"},
    "accuracy": pl.Float64,
}


def fidelity_section(
    rows: pl.DataFrame, fidelity_path: Path, accuracy_path: Path, metrics: Sequence[str]
) -> Section:
    """Draw accuracy under real eviction against the replay's numbers, family by family.

    Parameters
    ----------
    rows : polars.DataFrame
        Of a replay; ``family`` tells whose trace it is.
    fidelity_path, accuracy_path : Path
        ``fidelity.csv`` and ``accuracy.csv`` of ``sim validate live``.
    metrics : sequence of str
        Columns of ``rows``, one chart per family each.

    Raises
    ------
    UserError
        If a file is no such table, or no family, policy and budget is in both.
    """
    what = f"--accuracy {accuracy_path}"
    fidelity = read_table(fidelity_path, f"--fidelity {fidelity_path}", _FIDELITY)
    accuracy = with_budget_kind(read_table(accuracy_path, what, _ACCURACY))
    right = pl.col("accuracy")
    refuse_rows(accuracy, right.is_null() | ~right.is_between(0, 1), "accuracy", "0 to 1", what)
    cells = _cells(rows, accuracy, metrics)
    if not cells:
        raise UserError(
            f"--accuracy {accuracy_path}: no family, policy and budget of it is in the rows; "
            "allowed: the table of a run with the same policies, parameters and budgets"
        )
    # Those of the whole page, so that a policy looks the same in all its charts.
    policies = ordered_policies(rows["policy"].to_list())
    families = fidelity["family"].unique(maintain_order=True).to_list()
    told = {(row["metric"], row["family"]): row for row in fidelity.iter_rows(named=True)}
    values = {
        "head": [
            f"{family or 'problems'}: {name}" for family in families for name in ("within", "all", "regret")
        ],
        "ranked": [
            (METRIC_NAMES.get(metric, metric), [told.get((metric, family)) for family in families])
            for metric in ranked_metrics(fidelity)
        ],
    }
    figures = scatter_figures(cells, fidelity, metrics, policies)
    return Section("What predicts accuracy", "predicted.html", values, figures, "validate.live")


def _cells(rows: pl.DataFrame, accuracy: pl.DataFrame, metrics: Sequence[str]) -> dict[str, Cells]:
    """Match means of rows with accuracies, per family; parameters tell policies apart, not their labels."""
    key = ["family", *CELL[1:], "name"]
    name = pl.col("policy").str.split(":").list.first().alias("name")
    family = pl.col("family").fill_null("")
    done = rows.filter(pl.col("status") == "ok").with_columns(name, family)
    means = done.group_by([*key, "policy"], maintain_order=True).agg(pl.col(list(metrics)).mean())
    judged = accuracy.filter(pl.col("budget_asked").is_not_null() & (family != ALL_FAMILIES))
    judged = judged.with_columns(name, family).cast(pl.Schema(CELL_SCHEMA))
    matched = means.join(judged.select(*key, "accuracy"), on=key, how="inner", maintain_order="left")
    found = {}
    for (own_family,), own in matched.group_by("family", maintain_order=True):
        simulated = {
            metric: np.array(own[metric])[:, None] * (1 if METRICS[metric].more_is_better else -1)
            for metric in metrics
        }
        found[str(own_family)] = Cells(own.select(CELL).rows(), simulated, np.array(own["accuracy"])[:, None])
    return found
