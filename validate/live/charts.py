"""Charts of live accuracy: against budget, against the simulator's metrics, and which predicts best."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import polars as pl

from simulator.charts import style as chart_style
from simulator.charts.style import COLOURS, over_plot, policy_looks
from simulator.results.labels import budget_label, row_budget
from simulator.results.tables import BUDGET
from validate.live.accuracy import ALL_FAMILIES
from validate.live.fidelity import LIVE_HALF, METRICS, Cells

# What the simulator's columns are called where people read them, and what a live run adds.
METRIC_NAMES = chart_style.METRIC_NAMES | {LIVE_HALF: "half of the problems, decoded"}


def accuracy_chart(accuracy: pl.DataFrame, policies: list[str]) -> alt.HConcatChart:
    """Draw pass@1 against budget, one panel per family; rows of `accuracy_table`."""
    families = [family for family in accuracy["family"].unique().sort() if family != ALL_FAMILIES]
    panels = [
        _accuracy_panel(accuracy.filter(pl.col("family") == family), family, policies, i == 0)
        for i, family in enumerate(families)
    ]
    return alt.hconcat(*panels, spacing=26, bounds="flush")


def _accuracy_panel(rows: pl.DataFrame, family: str, policies: list[str], leftmost: bool) -> Any:
    evicting = rows.filter(pl.col("budget_asked").is_not_null())
    budgets = [
        budget_label(*row) for row in evicting.select(BUDGET).unique().sort("budget_asked").iter_rows()
    ]
    values = [
        {
            "policy": row["policy"],
            "budget": row_budget(row),
            **{name: 100 * row[name] for name in ("accuracy", "low", "high")},
        }
        for row in evicting.sort("budget_asked").iter_rows(named=True)
    ]
    legend = alt.Legend(
        title=None, orient="bottom", columns=10, symbolSize=70, symbolStrokeWidth=0, symbolOpacity=1
    )
    colour, shape, dash = policy_looks(policies, legend)
    x = alt.X("budget:O", sort=budgets, title="budget, per KV head", axis=alt.Axis(labelAngle=0))
    base = alt.Chart(alt.Data(values=values)).encode(x=x, color=colour)
    y = alt.Y(
        "accuracy:Q",
        title="right answers, %" if leftmost else None,
        scale=alt.Scale(domain=[0, 100]),
        # Hidden, not left out: titles are placed above the labels, and shall all be at one height.
        axis=alt.Axis(labelOpacity=1 if leftmost else 0, values=[0, 20, 40, 60, 80, 100]),
    )
    layers = [
        base.mark_rule(strokeWidth=1, opacity=0.55).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.6).encode(y=y, strokeDash=dash),
        base.mark_point(size=36, filled=True, opacity=1).encode(y=y, shape=shape),
    ]
    full = [
        100 * row["accuracy"] for row in rows.filter(pl.col("budget_asked").is_null()).iter_rows(named=True)
    ]
    if full:
        rule = alt.Chart(alt.Data(values=[{"full": full[0], "text": f"full cache {full[0]:.0f}%"}]))
        layers.insert(0, rule.mark_rule(color="black", strokeWidth=1.2).encode(y="full:Q"))
        text = rule.mark_text(align="left", dx=4, dy=8 if full[0] > 90 else -6, fontSize=10, color="black")
        layers.append(text.encode(x=alt.value(0), y="full:Q", text="text:N"))
    return alt.layer(*layers).properties(width=270, height=240, title=over_plot(family or "problems"))


def scatter_chart(
    cells: dict[str, Cells], fidelity: pl.DataFrame, metrics: list[str], policies: list[str]
) -> alt.VConcatChart:
    """Draw live accuracy against metrics of the simulator: a row per metric, a panel per family."""
    rows = [
        alt.hconcat(
            *(
                scatter_panel(own, metric, policies, leftmost=i == 0).properties(
                    title=_scatter_title(fidelity, family, metric)
                )
                for i, (family, own) in enumerate(cells.items())
            ),
            spacing=26,
            bounds="flush",
        )
        for metric in metrics
    ]
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


def _scatter_title(fidelity: pl.DataFrame, family: str, metric: str) -> alt.TitleParams:
    own = fidelity.filter((pl.col("family") == family) & (pl.col("metric") == metric)).row(0, named=True)
    return over_plot(
        family or "problems",
        f"Spearman {own['spearman']:.2f}, within a budget {own['spearman_within']:.2f}",
    )


def ranking_chart(fidelity: pl.DataFrame) -> alt.HConcatChart:
    """Draw how well each metric orders cells, over all of them and within a budget, with intervals."""
    order = (
        fidelity.group_by("metric")
        .agg(pl.col("spearman_within").fill_nan(None).mean())
        .sort("spearman_within")["metric"]
        .to_list()
    )
    names = [METRIC_NAMES[metric] for metric in reversed(order)]
    families = fidelity["family"].unique(maintain_order=True).to_list()
    panels = []
    for column, title in (
        ("spearman_within", "within one budget"),
        ("spearman", "over all policies and budgets"),
    ):
        values = [
            {
                "metric": METRIC_NAMES[row["metric"]],
                "family": row["family"] or "problems",
                "value": row[column],
                "low": row[f"{column}_low"],
                "high": row[f"{column}_high"],
            }
            for row in fidelity.iter_rows(named=True)
        ]
        legend = alt.Legend(title=None, orient="bottom")
        base = alt.Chart(alt.Data(values=values)).encode(
            y=alt.Y("metric:N", sort=names, title=None, axis=alt.Axis(labelLimit=220)),
            yOffset=alt.YOffset("family:N", sort=families),
            color=alt.Color("family:N", sort=families, scale=alt.Scale(range=list(COLOURS)), legend=legend),
        )
        floor = min(0.0, float(np.floor(10 * min(value["low"] for value in values)) / 10))
        x = alt.X("value:Q", title="Spearman correlation with accuracy", scale=alt.Scale(domain=[floor, 1]))
        bars = base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(x=alt.X("low:Q"), x2="high:Q")
        points = base.mark_point(filled=True, size=48, opacity=1).encode(x=x)
        panels.append((bars + points).properties(width=330, height=34 * len(names), title=over_plot(title)))
    return alt.hconcat(*panels, spacing=26)
