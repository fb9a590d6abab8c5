"""The page of a live run: what was right, what it took, what predicted it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from simulator.charts.style import ordered_policies, styled
from simulator.report.figure import Figure
from simulator.report.page import Section, origin, page, this_command
from simulator.report.quality import crowded
from simulator.results.labels import with_budget_label
from simulator.results.tables import BUDGET
from traces.atomic import write_text
from traces.extras import require_extra
from traces.wording import counted
from validate.live.accuracy import ALL_FAMILIES, compare
from validate.live.fidelity import Cells, best_metric
from validate.live.terminal import published_text

# Policies that are set against each other level by level: the layer's share, the head's share, both.
_PAIRS = (("rkv+wave", "rkv"), ("rkv+utility", "rkv"), ("reasonalloc", "rkv"), ("pyramid-rkv", "rkv"))


def write_report(
    path: Path,
    rows: pl.DataFrame,
    accuracy: pl.DataFrame,
    folder: Path,
    cells: dict[str, Cells] | None = None,
    fidelity: pl.DataFrame | None = None,
    note: str = "",
    published: pl.DataFrame | None = None,
    source: str = "",
) -> int:
    """Write the page, and its charts as pictures; give their number.

    Parameters
    ----------
    path : Path
    rows : polars.DataFrame
        Of ``completions.ROW_SCHEMA``.
    accuracy : polars.DataFrame
        Of `accuracy_table`.
    folder : Path
        Where ``NAME.svg`` of every chart goes.
    cells, fidelity
        Of `matched_cells` and `fidelity_table`; None without simulated rows.
    note : str
        What a reader has to know first.
    published : polars.DataFrame
        Of `beside_published`; None without published numbers.
    source : str
        Where those are from.

    Raises
    ------
    UserError
        If the packages that draw charts are not installed.
    """
    require_extra("a report", "altair", "vl_convert", "jinja2")
    import vl_convert

    from validate.live import charts

    policies = ordered_policies(rows["policy"].to_list())
    pictures: dict[str, Any] = {"accuracy": charts.accuracy_chart(accuracy, policies)}
    sections = [
        _section(
            "What was decoded, and what was right", "decoded", _what_ran(rows, accuracy) | {"note": note}
        ),
        _section(
            "Right answers against budget",
            "accuracy",
            {"crowded": crowded(accuracy)},
            charts.accuracy_figures(accuracy, policies),
        ),
    ]
    if cells is not None and fidelity is not None:
        best = best_metric(fidelity)
        shown = [best] if best == "mass_mean" else [best, "mass_mean"]
        pictures["predictors"] = charts.ranking_chart(fidelity)
        pictures["scatter"] = charts.scatter_chart(cells, fidelity, shown, policies)
        values = {
            "best": best,
            "name": charts.METRIC_NAMES[best],
            "told": fidelity.filter(metric=best).to_dicts(),
            "fidelity": fidelity.sort("family", "spearman_within", descending=[False, True]).to_dicts(),
        }
        figures = charts.ranking_figures(fidelity) + charts.scatter_figures(cells, fidelity, shown, policies)
        sections.append(_section("How well the simulator predicts this", "predictors", values, figures))
    if published is not None:
        marks: dict[str, str] = {}
        texts = [(row, published_text(row, marks)) for row in with_budget_label(published).to_dicts()]
        told = {"rows": texts, "marks": marks, "source": source}
        sections.append(_section("Beside the published numbers", "published", told))
    held = set(rows["policy"])
    pairs = {
        f"{policy} less {other}": with_budget_label(compare(rows, policy, other))
        .sort("family", "budget_asked")
        .to_dicts()
        for policy, other in _PAIRS
        if {policy, other} <= held
    }
    if pairs:
        sections.append(_section("Level by level, at equal budget", "levels", {"pairs": pairs}))
    order = ["family", "budget_asked", "accuracy"]
    every = with_budget_label(accuracy).sort(order, descending=[False, False, True], nulls_last=False)
    sections.append(_section("All policies and budgets", "policies", {"rows": every.to_dicts()}))
    made = page("KV budgets under real eviction", sections, origin(rows, this_command()))
    write_text(path, made.text)
    for name, chart in pictures.items():
        write_text(folder / f"{name}.svg", vl_convert.vegalite_to_svg(styled(chart).to_dict()))
    return len(pictures)


def _section(title: str, template: str, values: dict[str, Any], figures: Sequence[Figure] = ()) -> Section:
    return Section(title, f"{template}.html", values, figures, "validate.live")


def _what_ran(rows: pl.DataFrame, accuracy: pl.DataFrame) -> dict[str, Any]:
    evicting = rows.filter(pl.col("budget_asked").is_not_null())
    full = accuracy.filter(pl.col("budget_asked").is_null() & (pl.col("family") != ALL_FAMILIES))
    return {
        "n_problems": counted(rows["problem"].n_unique(), "problem"),
        "n_samples": rows["sample"].n_unique(),
        "n_policies": evicting["policy"].n_unique(),
        "n_budgets": evicting.select(BUDGET).n_unique(),
        "n_texts": len(rows),
        "full": full.to_dicts(),
        "leaders": _leaders(rows, accuracy),
    }


def _leaders(rows: pl.DataFrame, accuracy: pl.DataFrame) -> list[dict[str, Any]]:
    """Name the policy that answers most over all families, those tied with it, and ``at`` which budgets."""
    if accuracy["family"].n_unique() > 1:
        accuracy = accuracy.filter(family=ALL_FAMILIES)
    pooled = with_budget_label(rows.with_columns(family=pl.lit(ALL_FAMILIES)))
    evicting = with_budget_label(accuracy.filter(pl.col("budget_asked").is_not_null()))
    ordered = evicting.sort("budget_unit", "budget_asked", "budget_kind", maintain_order=True)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for (budget,), own in ordered.group_by("budget", maintain_order=True):
        first, *others = own.sort("accuracy", descending=True, maintain_order=True).to_dicts()
        here = pooled.filter(budget=budget)
        less = [(row["policy"], compare(here, first["policy"], row["policy"])["low"]) for row in others]
        tied = [policy for policy, low in less if low.is_empty() or low[0] <= 0]
        told = found.setdefault((first["policy"], *tied), {"first": first["policy"], "tied": tied, "at": []})
        told["at"].append(first)
    return list(found.values())
