"""Draw how the budgets of KV heads go on over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from simulator.charts.style import COLOURS, DASHES, cycled, over_plot, styled
from simulator.results.labels import row_budget
from simulator.results.tables import GROUP
from traces.atomic import write_file
from traces.errors import UserError

if TYPE_CHECKING:
    import altair as alt

SUFFIXES = (".svg", ".png", ".html")
# Panels side by side: as many as a page holds, and rows of equal length where that is possible.
_MOST_COLUMNS = 4
_CELL = ("trace", *GROUP)


def head_budgets(trajectory: pl.DataFrame) -> alt.FacetChart:
    """Draw every KV head's budget against time, a panel per layer, and the mean of all as a straight line.

    Raises UserError unless the rows are of one trace, policy and budget that compressed at least once.
    """
    import altair as alt

    cells = trajectory.select(_CELL).unique(maintain_order=True)
    if len(cells) != 1:
        raise UserError(
            f"a figure of head budgets shows one trace, policy and budget; {len(cells)} are given"
        )
    steps = trajectory.filter(pl.col("budget_entries").is_not_null())
    if steps.is_empty():
        raise UserError(f"policy '{cells['policy'][0]}' never compressed; there are no budgets to draw")
    n_heads = trajectory["kv_head"].n_unique()
    mean, values = _points(steps, n_heads)
    base = alt.Chart(alt.Data(values=values))
    legend = alt.Legend(
        title="KV head",
        orient="bottom",
        columns=8,
        symbolType="stroke",
        symbolSize=500,
        symbolStrokeWidth=2.2,
    )
    lines = base.mark_line(interpolate="step-after").encode(
        x=alt.X(
            "tokens:Q", title="tokens", scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(tickCount=5)
        ),
        y=alt.Y("budget:Q", title="entries per KV head", axis=alt.Axis(tickCount=4)),
        color=_head_colours(n_heads, legend),
        # As many as there are dashes are told apart in black and white.
        strokeDash=cycled(alt.StrokeDash, "head:N", range(n_heads), DASHES, legend),
        # Thinner lines are drawn over thicker ones, so that heads of equal budgets can all be seen.
        strokeWidth=alt.StrokeWidth("width:Q", scale=None),
    )
    rule = base.mark_rule(strokeWidth=0.8, color="#222222").encode(y="mean(mean):Q")
    layers = [f"layer {layer}" for layer in trajectory["layer"].unique().sort()]
    columns = _columns(len(layers))
    title = over_plot(
        f"Budgets of KV heads: {cells['policy'][0]} at {_budget_words(cells.row(0, named=True))}",
        f"{cells['trace'][0]}. Straight line: the mean over layers and heads, {mean:.0f} entries. "
        "Lines begin at the first compression.",
    )
    width = 170 if columns > 2 else 300
    return (
        alt.layer(rule, lines)
        .properties(width=width, height=110)
        .facet(
            alt.Facet(
                "layer:N", sort=layers, header=alt.Header(title=None, labelPadding=3, labelFontSize=11)
            ),
            columns=columns,
        )
        .properties(title=title)
    )


def _points(steps: pl.DataFrame, n_heads: int) -> tuple[float, list[dict[str, Any]]]:
    """Give the mean of the last budgets, and the points of every head's line."""
    head = ["layer", "kv_head"]
    steps = steps.sort(*head, "n_tokens")
    mean = float(
        steps.group_by(head).agg(pl.col("budget_entries").last())["budget_entries"].to_numpy().mean()
    )
    # A line needs the points where a budget changes, and the last: between two it stays as it is.
    before = pl.col("budget_entries").shift(1).over(head)
    is_last = pl.col("compression").is_null()
    steps = steps.filter(before.is_null() | (before != pl.col("budget_entries")) | is_last)
    return mean, [
        {
            "layer": f"layer {row['layer']}",
            "head": row["kv_head"],
            "width": 2.6 - 1.4 * row["kv_head"] / max(1, n_heads - 1),
            "tokens": row["n_tokens"],
            "budget": row["budget_entries"],
            "mean": mean,
        }
        for row in steps.select(*head, "n_tokens", "budget_entries").iter_rows(named=True)
    ]


def save(chart: Any, path: Path) -> None:
    """Write a chart as SVG, PNG or one self-contained HTML file, by the suffix of ``path``."""
    chart = styled(chart)

    def write(temporary: Path) -> None:
        if path.suffix == ".html":
            temporary.write_text(chart.to_html(inline=True), encoding="utf-8")
        else:
            sharp = {"ppi": 200} if path.suffix == ".png" else {}
            chart.save(str(temporary), format=path.suffix[1:], **sharp)

    write_file(path, write)


def _head_colours(n_heads: int, legend: alt.Legend) -> alt.Color:
    import altair as alt

    if n_heads <= len(COLOURS):
        return cycled(alt.Color, "head:N", range(n_heads), COLOURS, legend)
    scale = alt.Scale(domain=list(range(n_heads)), scheme="tableau10" if n_heads <= 10 else "tableau20")
    return alt.Color("head:N", scale=scale, legend=legend)


def _columns(n_panels: int) -> int:
    if n_panels <= _MOST_COLUMNS:
        return n_panels
    return next((n for n in (_MOST_COLUMNS, 3) if n_panels % n == 0), _MOST_COLUMNS)


def _budget_words(row: dict[str, Any]) -> str:
    budget = row_budget(row)
    return f"{budget} entries per KV head" if budget.isdigit() else f"a budget of {budget}"
