"""Charts of one cell's KV heads: where memory went, what it held, and how that changed over time."""

from __future__ import annotations

from typing import Any

import polars as pl

from simulator.charts.head_budgets import head_budgets
from simulator.report.figure import Figure

_HEAD = ["layer", "kv_head"]
# So many squares can hold their number in print that can be read.
_MOST_NUMBERS = 96
# Points of lines over time that a page carries for one cell.
_MOST_POINTS = 6000
_LIGHT, _DARK = "#f2f6fb", "#08306b"


def head_summary(trajectory: pl.DataFrame) -> pl.DataFrame:
    """Summarise the heads of the trajectory of one trace, policy and budget.

    Returns
    -------
    polars.DataFrame
        layer, kv_head; ``mass`` retained, mean over decode steps; ``budget``, the last in force, null if
        nothing was compressed.
    """
    ordered = trajectory.sort(*_HEAD, "n_tokens", "n_steps")
    weighted = (pl.col("mass") * pl.col("n_steps")).sum() / pl.col("n_steps").filter(
        pl.col("mass").is_not_null()
    ).sum()
    return ordered.group_by(_HEAD, maintain_order=True).agg(
        mass=weighted, budget=pl.col("budget_entries").drop_nulls().last()
    )


def head_figures(
    name: str,
    cell: str,
    trajectory: pl.DataFrame,
    mass_range: tuple[float, float],
    budget_range: tuple[float, float],
) -> list[Figure]:
    """Draw one cell's heads: a map of mass, a map of budgets, and budgets over time.

    ``name`` is the cell's in figures' names, ``cell`` as people read it. The ranges are what the lightest and
    darkest shades stand for: the same for all cells, so that they compare.
    """
    summary = head_summary(trajectory)
    figures = [
        Figure(
            f"mass-map-{name}",
            _map(summary, "mass", "retained mass", ".0%", mass_range),
            "Retained mass, layer by head",
            "Mean over decode steps. Darker is more; shades mean the same for all policies here.",
            cell,
        )
    ]
    if summary["budget"].null_count() == 0:
        figures += [
            Figure(
                f"budget-map-{name}",
                _map(summary, "budget", "entries", ".0f", budget_range),
                "Budget, layer by head",
                "Entries after the last compression. Darker is more.",
                cell,
            ),
            Figure(
                f"budgets-{name}",
                _untitled(head_budgets(_thinned(trajectory))),
                "Head budgets over time",
                "A panel per layer, a line per KV head. Thin and straight: the mean over layers and heads.",
                cell,
            ),
        ]
    return figures


def _thinned(trajectory: pl.DataFrame) -> pl.DataFrame:
    """Keep every n-th compression, and the end, where there are more than a line can show."""
    every = -(-len(trajectory) // _MOST_POINTS)
    kept = pl.col("compression").is_null() | (pl.col("compression") % every == 0)
    return trajectory.filter(kept)


def _untitled(chart: Any) -> Any:
    import altair as alt

    chart.title = alt.Undefined
    return chart


def _map(summary: pl.DataFrame, value: str, title: str, form: str, value_range: tuple[float, float]) -> Any:
    import altair as alt

    low, high = value_range
    n_layers = summary["layer"].n_unique()
    values = [
        {"layer": row["layer"], "head": row["kv_head"], "value": row[value]}
        for row in summary.iter_rows(named=True)
    ]
    # A range without width has one shade, and a scale needs two ends.
    scale = alt.Scale(domain=[low, high if high > low else low + 1], range=[_LIGHT, _DARK], interpolate="lab")
    legend = alt.Legend(
        title=title, format=form, orient="bottom", gradientLength=200, gradientThickness=12, tickCount=4
    )
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("head:O", title="KV head", axis=alt.Axis(labelAngle=0)), y=alt.Y("layer:O", title="layer")
    )
    squares = base.mark_rect(stroke="white", strokeWidth=1).encode(
        color=alt.Color("value:Q", scale=scale, legend=legend),
        tooltip=[
            alt.Tooltip("layer:O"),
            alt.Tooltip("head:O", title="KV head"),
            alt.Tooltip("value:Q", title=title, format=".1%" if form.endswith("%") else form),
        ],
    )
    layers: list[Any] = [squares]
    if len(values) <= _MOST_NUMBERS:
        # Where white and black print stand out equally.
        dark = f"datum.value > {low + 0.62 * (high - low)}"
        layers.append(
            base.mark_text(fontSize=11).encode(
                text=alt.Text("value:Q", format=form),
                color=alt.condition(dark, alt.value("white"), alt.value("black")),
            )
        )
    return alt.layer(*layers).properties(width=340, height=max(120, min(640, 24 * n_layers)))
