"""Results averaged over traces, few enough rows to store beside what was measured live."""

from __future__ import annotations

import polars as pl

from simulator.results.labels import budget_label
from simulator.results.metric_names import COMPARED, ESTIMATED, MEASURED, METRICS
from simulator.results.ranking import spearman
from simulator.results.tables import BUDGET, GROUP, comparable, mean_over_traces, with_budget_kind

# Digits after the point: far below what traces differ by.
_DIGITS = 7


def cell_means(rows: pl.DataFrame) -> pl.DataFrame:
    """Average a replay's rows over traces, per family, policy and budget.

    Where some cells failed, a budget is averaged over the traces on which all its policies succeeded.

    Returns
    -------
    polars.DataFrame
        family (empty for traces without one), the columns of ``results.GROUP``, ``n_traces``;
        the means of ``bytes_mean``, ``oracle_mass`` and of all of ``metric_names.COMPARED``.
    """
    # Of a column that rows of an earlier version lack there is no mean, nor of one that nothing could tell.
    numbers = [name for name in ("bytes_mean", "oracle_mass", *METRICS, *MEASURED) if name in rows.columns]
    numbers += [name for name in ESTIMATED if name in rows.columns and rows[name].count()]
    done = comparable(rows).with_columns(pl.col("family").fill_null(""))
    means = done.group_by("family", *GROUP, maintain_order=True).agg(
        pl.len().alias("n_traces"), *(mean_over_traces(name).round(_DIGITS) for name in numbers)
    )
    return means.with_columns(pl.col("bytes_mean").round(0).cast(pl.Int64))


def chosen_elsewhere(chosen_on: pl.DataFrame, judged_on: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Choose the best policy of every budget on some traces, and judge it on others.

    Parameters
    ----------
    chosen_on, judged_on : polars.DataFrame
        Results, or means of `cell_means`; one row per policy and budget, policies told apart by name.
    metric : str
        One of ``metric_names.COMPARED``.

    Returns
    -------
    polars.DataFrame
        One row per budget: ``winner`` where it was chosen and its value there, ``here``; its value on the
        others, ``there``, and its place among the ``n_policies``; ``best_there`` and its value, ``could``;
        ``spearman``, how alike both order the policies.
    """
    key = ["policy", *BUDGET]
    chosen_on, judged_on = map(with_budget_kind, (chosen_on, judged_on))
    joined = chosen_on.select(*key, here=metric).join(judged_on.select(*key, there=metric), on=key)
    rows = []
    for budget, own in joined.group_by(key[1:], maintain_order=True):
        order = [COMPARED[metric].more_is_better, False]
        first = own.sort("here", "policy", descending=order).row(0, named=True)
        ranked = own.sort("there", "policy", descending=order)
        rows.append(
            {"budget": budget_label(*budget), "winner": first["policy"]}
            | {"here": first["here"], "there": first["there"]}
            | {"place": ranked["policy"].to_list().index(first["policy"]) + 1, "n_policies": len(own)}
            | {"best_there": ranked["policy"][0], "could": ranked["there"][0]}
            | {"spearman": spearman(own["here"], own["there"])}
        )
    return pl.DataFrame(rows)
