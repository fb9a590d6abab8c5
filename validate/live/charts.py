"""Charts of live accuracy: against budget, against the simulator's metrics, and which predicts best."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import altair as alt
import numpy as np
import polars as pl

from simulator.charts import style as chart_style
from simulator.charts.style import COLOURS, over_plot, policy_looks
from simulator.report.figure import Figure
from simulator.report.quality import against_budget, leading, looks
from simulator.results.labels import with_budget_label
from traces.wording import number
from validate.live.accuracy import ALL_FAMILIES
from validate.live.fidelity import LIVE_HALF, METRICS, Cells, ranked_metrics

# What the simulator's columns are called where people read them, and what a live run adds.
METRIC_NAMES = chart_style.METRIC_NAMES | {LIVE_HALF: "half of the problems, decoded"}
# Correlations of `fidelity_table`, and over which cells each is.
_CORRELATIONS = {"spearman_within": "within one budget", "spearman": "over all policies and budgets"}


def accuracy_figures(accuracy: pl.DataFrame, policies: list[str], all_at_once: bool = False) -> list[Figure]:
    """Draw pass@1 against budget, one figure per family.

    Parameters
    ----------
    accuracy : polars.DataFrame
        Of `accuracy_table`.
    policies : list of str
        Those of the whole page.
    all_at_once : bool
        Whether all policies of a crowd stand out, as in a picture, where none can be pointed at.
    """
    accuracy = with_budget_label(accuracy.rename({"accuracy": "mean"}).sort("budget_asked"))
    evicting = accuracy.filter(pl.col("budget_asked").is_not_null())
    first = policies if all_at_once else leading(evicting, more_is_better=True)
    shown_as = looks(evicting, policies, first)
    y = alt.Y("mean:Q", title="right answers", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tooltip = [alt.Tooltip("policy:N"), alt.Tooltip("budget:N")]
    for column, title in (("mean", "right answers"), ("low", "from"), ("high", "to")):
        tooltip.append(alt.Tooltip(f"{column}:Q", title=title, format=".1%"))
    figures = []
    for family in accuracy["family"].unique().sort():
        if family == ALL_FAMILIES:
            continue
        own = evicting.filter(family=family)
        values = own.select("policy", "budget", "mean", "low", "high").to_dicts()
        chart = against_budget(own, values, shown_as, y, tooltip)
        for full in accuracy.filter(pl.col("budget_asked").is_null(), family=family)["mean"]:
            told = {"full": full, "text": f"full cache {full:.0%}"}
            base = alt.Chart(alt.Data(values=[told])).encode(y="full:Q")
            text = base.mark_text(align="left", dx=4, dy=8 if full > 0.9 else -6, fontSize=11, color="black")
            chart = base.mark_rule(color="black") + chart + text.encode(x=alt.value(0), text="text:N")
        name = family or "problems"
        figures.append(Figure(f"accuracy-{name}", chart.properties(width=270, height=240), name.capitalize()))
    return figures


def accuracy_chart(accuracy: pl.DataFrame, policies: list[str]) -> alt.HConcatChart:
    """Draw the same side by side, as one picture."""
    figures = accuracy_figures(accuracy, policies, all_at_once=True)
    panels = [figure.chart.properties(title=over_plot(figure.title)) for figure in figures]
    with warnings.catch_warnings():
        # That what is pointed at in one panel is so in all of them; a picture knows no pointer.
        warnings.simplefilter("ignore", UserWarning)
        return alt.hconcat(*panels, spacing=26)


def scatter_figures(
    cells: dict[str, Cells], fidelity: pl.DataFrame, metrics: Sequence[str], policies: list[str]
) -> list[Figure]:
    """Draw live accuracy against metrics of the simulator, one figure per metric and family."""
    return [
        Figure(
            f"accuracy-{metric}-{family or 'problems'}",
            scatter_panel(own, metric, policies),
            f"{family or 'problems'}: {METRIC_NAMES[metric]}".capitalize(),
            _correlations(fidelity, family, metric),
        )
        for metric in metrics
        for family, own in cells.items()
    ]


def scatter_chart(
    cells: dict[str, Cells], fidelity: pl.DataFrame, metrics: Sequence[str], policies: list[str]
) -> alt.VConcatChart:
    """Draw the same in one picture: a row per metric, a panel per family."""
    rows = []
    for metric in metrics:
        panels = []
        for i, (family, own) in enumerate(cells.items()):
            title = over_plot(family or "problems", _correlations(fidelity, family, metric))
            panels.append(scatter_panel(own, metric, policies, leftmost=i == 0).properties(title=title))
        rows.append(alt.hconcat(*panels, spacing=26, bounds="flush"))
    return alt.vconcat(*rows, spacing=18)


def scatter_panel(cells: Cells, metric: str, policies: list[str], leftmost: bool = True) -> alt.LayerChart:
    """Draw one family's live accuracy against one metric; only the leftmost panel labels its axis."""
    sign = 1 if METRICS[metric].more_is_better else -1
    values = [
        {"policy": label[0], "budget": label[2], "metric": float(sign * x), "accuracy": float(100 * y)}
        for label, x, y in zip(
            cells.labels, cells.simulated[metric].mean(1), cells.solved.mean(1), strict=True
        )
    ]
    legend = alt.Legend(
        title=None, orient="bottom", columns=10, symbolSize=70, symbolStrokeWidth=0, symbolOpacity=1
    )
    colour, shape, _ = policy_looks(policies, legend)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "metric:Q",
            title=METRIC_NAMES[metric],
            scale=alt.Scale(zero=False),
            axis=alt.Axis(tickCount=5),
        ),
        y=alt.Y(
            "accuracy:Q",
            title="right answers, %" if leftmost else None,
            scale=alt.Scale(domain=[0, 100]),
            axis=alt.Axis(labelOpacity=1 if leftmost else 0),
        ),
        color=colour,
    )
    lines = base.mark_line(strokeWidth=0.8, opacity=0.5).encode(order="budget:Q")
    points = base.mark_point(size=44, filled=True, opacity=1).encode(shape=shape)
    return (lines + points).properties(width=270, height=210)


def _correlations(fidelity: pl.DataFrame, family: str, metric: str) -> str:
    told = fidelity.filter((pl.col("family") == family) & (pl.col("metric") == metric))
    if told.is_empty():
        return ""
    row = told.row(0, named=True)
    return f"Spearman {number(row['spearman'], 2)}, within a budget {number(row['spearman_within'], 2)}"


def ranking_figures(fidelity: pl.DataFrame) -> list[Figure]:
    """Draw how well each metric orders cells, over all of them and within a budget, with intervals."""
    return [
        Figure(f"predictors-{column}", _ranking_panel(fidelity, column), f"Correlation {over}")
        for column, over in _CORRELATIONS.items()
    ]


def ranking_chart(fidelity: pl.DataFrame) -> alt.HConcatChart:
    """Draw the figures of `ranking_figures` side by side."""
    panels = [
        _ranking_panel(fidelity, column).properties(width=330, title=over_plot(over))
        for column, over in _CORRELATIONS.items()
    ]
    return alt.hconcat(*panels, spacing=26)


def _ranking_panel(fidelity: pl.DataFrame, column: str) -> alt.LayerChart:
    told = fidelity.with_columns(pl.col("^spearman.*$").fill_nan(None))
    names = [METRIC_NAMES[metric] for metric in ranked_metrics(fidelity)]
    families = fidelity["family"].unique(maintain_order=True).to_list()
    values = [
        {
            "metric": METRIC_NAMES[row["metric"]],
            "family": row["family"] or "problems",
            "value": row[column],
            "low": row[f"{column}_low"],
            "high": row[f"{column}_high"],
        }
        for row in told.iter_rows(named=True)
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("metric:N", sort=names, title=None, axis=alt.Axis(labelLimit=220)),
        yOffset=alt.YOffset("family:N", sort=families),
        color=alt.Color(
            "family:N",
            sort=families,
            scale=alt.Scale(range=list(COLOURS)),
            legend=alt.Legend(title=None, orient="bottom"),
        ),
    )
    lows = [value["low"] for value in values if value["low"] is not None]
    floor = min([0.0, *(float(np.floor(10 * low) / 10) for low in lows)])
    x = alt.X("value:Q", title="Spearman correlation with accuracy", scale=alt.Scale(domain=[floor, 1]))
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(x=alt.X("low:Q"), x2="high:Q")
    points = base.mark_point(filled=True, size=48, opacity=1).encode(x=x)
    return (bars + points).properties(height=34 * len(names))
