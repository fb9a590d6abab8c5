"""Charts of quality: against the memory that was held, and against the budget that was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from simulator.charts.style import METRIC_NAMES, ordered_policies, policy_looks
from simulator.report.figure import Figure
from simulator.results.labels import with_budget_label
from simulator.results.metric_names import COMPARED
from simulator.results.standings import standings
from simulator.results.tables import GROUP, comparable

if TYPE_CHECKING:
    import altair as alt

_WIDTH, _HEIGHT = 460, 300
_ORACLE = "the most that memory could hold"


def quality_rows(rows: pl.DataFrame, metric: str, seed: int = 0) -> pl.DataFrame:
    """Bring standings and memory of a replay's rows together, one row per evicting policy and budget.

    Policies are told apart by name; ``seed`` is of the bootstrap.

    Returns
    -------
    polars.DataFrame
        Of `standings`, with ``budget`` (as it was asked), ``bytes`` and ``oracle`` (means; the latter null
        where rows have none) and ``is_front``, whether nothing is at least as good with less memory.
        Budgets in ascending order.
    """
    found = standings(rows, metric, seed=seed)
    if found.is_empty():
        return found
    evicting = comparable(rows).filter(pl.col("n_evictions") > 0)
    if "oracle_mass" not in evicting.columns:
        evicting = evicting.with_columns(oracle_mass=pl.lit(None, dtype=pl.Float64))
    memory = evicting.group_by(GROUP).agg(
        bytes=pl.col("bytes_mean").mean(), oracle=pl.col("oracle_mass").mean()
    )
    found = found.join(memory, on=GROUP, how="left", maintain_order="left")
    found = found.sort("budget_unit", "budget_asked", "budget_kind", maintain_order=True)
    sign = 1 if COMPARED[metric].more_is_better else -1
    places = [(row["bytes"], sign * row["mean"]) for row in found.iter_rows(named=True)]
    return with_budget_label(found).with_columns(
        is_front=pl.Series([not any(_beats(other, own) for other in places) for own in places]),
    )


def has_intervals(found: pl.DataFrame) -> bool:
    """Tell whether there are traces to resample: one alone has no interval."""
    return bool((found["n_traces"] > 1).any())


def _beats(other: tuple[float, float], own: tuple[float, float]) -> bool:
    return other != own and other[0] <= own[0] and other[1] >= own[1]


# More policies than that are grey at first, but for the leading ones.
_MOST_AT_ONCE, _LEADING = 12, 8


def quality_figures(found: pl.DataFrame, metric: str, policies: Sequence[str] = ()) -> list[Figure]:
    """Draw the Pareto front and quality against budget; rows of `quality_rows`.

    ``policies`` are those of the whole page, whose looks are the same in all its charts.
    """
    policies = policies or ordered_policies(found["policy"].to_list())
    name = METRIC_NAMES[metric]
    better = "More" if COMPARED[metric].more_is_better else "Less"
    intervals = " Thin bars: 95% intervals over traces." if has_intervals(found) else ""
    bound = f" Black and dashed: {_ORACLE}." if _has_bound(found, metric) else ""
    return [
        Figure(
            f"pareto-{metric}",
            _pareto(found, metric, policies),
            f"{_capital(name)} against memory",
            f"{better} is better. Grey line: the front, what no other policy betters with as little memory."
            f"{bound}{intervals}",
        ),
        Figure(
            f"budget-{metric}",
            _against_budget(found, metric, policies),
            f"{_capital(name)} against budget",
            f"{better} is better. Points of one budget stand side by side.{intervals}",
        ),
    ]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _has_bound(found: pl.DataFrame, metric: str) -> bool:
    return metric == "mass_mean" and found["oracle"].null_count() == 0


def _values(found: pl.DataFrame, unit: float) -> list[dict[str, Any]]:
    names = ("policy", "budget", "mean", "low", "high", "is_front", "oracle")
    return [
        {name: row[name] for name in names} | {"memory": row["bytes"] / unit}
        for row in found.iter_rows(named=True)
    ]


def _unit(largest: float) -> tuple[str, float]:
    for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if largest >= size:
            return name, size
    return "bytes", 1.0


def crowded(found: pl.DataFrame) -> bool:
    """Say whether there are more policies that evict than a chart can show at once."""
    return len(ordered_policies(found["policy"].to_list())) > _MOST_AT_ONCE


def leading(found: pl.DataFrame, more_is_better: bool) -> list[str]:
    """Name the policies of the best ``mean`` over budgets, as many as may stand out of a crowd."""
    means = found.group_by("policy").agg(pl.col("mean").mean())
    return means.sort("mean", "policy", descending=[more_is_better, False])["policy"].head(_LEADING).to_list()


def looks(
    found: pl.DataFrame, policies: Sequence[str], leading: Sequence[str]
) -> tuple[alt.Color, alt.Shape, alt.StrokeDash, list[alt.Parameter], alt.When]:
    """Give looks, and what fades all policies but the one pointed at or chosen in the legend.

    The legend has the policies of ``found``, the chart's rows. ``policies`` are those of the whole page,
    whose looks are the same in all its charts; ``leading`` are those that stand out at first, of a crowd.
    """
    import altair as alt

    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=4,
        symbolSize=80,
        symbolStrokeWidth=0,
        symbolOpacity=1,
        symbolLimit=0,
        values=ordered_policies(found["policy"].to_list()),
    )
    colour, shape, dash = policy_looks(list(policies), legend)
    # Of a crowd a few stand out at first; the others are grey until they are asked for.
    first = [{"policy": name} for name in leading] if crowded(found) else alt.Undefined
    chosen = alt.selection_point(fields=["policy"], bind="legend", value=first)
    pointed = alt.selection_point(fields=["policy"], on="pointerover", clear="pointerout")
    return colour, shape, dash, [chosen, pointed], alt.when(chosen & pointed)


def _quality_axis(metric: str) -> alt.Y:
    import altair as alt

    own = COMPARED[metric]
    axis = alt.Axis(format="%" if own.is_share else ".3~g", title=own.title, tickCount=6)
    return alt.Y("mean:Q", scale=alt.Scale(zero=False), axis=axis)


def _tooltip(metric: str, memory: str) -> list[alt.Tooltip]:
    import altair as alt

    form = ".2%" if COMPARED[metric].is_share else ".3~g"
    return [
        alt.Tooltip("policy:N"),
        alt.Tooltip("budget:N"),
        alt.Tooltip("mean:Q", title=COMPARED[metric].title, format=form),
        alt.Tooltip("low:Q", title="from", format=form),
        alt.Tooltip("high:Q", title="to", format=form),
        alt.Tooltip("memory:Q", title=f"memory, {memory}", format=".3~r"),
    ]


def _pareto(found: pl.DataFrame, metric: str, policies: Sequence[str]) -> Any:
    import altair as alt

    memory, unit = _unit(float(found["bytes"].to_numpy().max()))
    colour, shape, _, chosen, when = looks(found, policies, leading(found, COMPARED[metric].more_is_better))
    x = alt.X(
        "memory:Q",
        title=f"memory held on average, {memory}",
        scale=alt.Scale(zero=True),
        axis=alt.Axis(tickCount=6),
    )
    base = alt.Chart(alt.Data(values=_values(found, unit))).encode(x=x)
    front = base.transform_filter("datum.is_front").mark_line(
        interpolate="step-after", color="#bdbdbd", strokeWidth=4
    )
    layers: list[Any] = [front.encode(y=_quality_axis(metric))]
    if _has_bound(found, metric):
        by_budget = found.group_by("budget", maintain_order=True).agg(pl.col("bytes", "oracle").mean())
        bound = alt.Data(
            values=[
                {"memory": row["bytes"] / unit, "oracle": row["oracle"], "budget": row["budget"]}
                for row in by_budget.iter_rows(named=True)
            ]
        )
        line = alt.Chart(bound).mark_line(
            color="black",
            strokeDash=[5, 4],
            strokeWidth=1.4,
            point={"color": "black", "size": 24, "filled": True},
        )
        tooltip = [alt.Tooltip("budget:N"), alt.Tooltip("oracle:Q", title=_ORACLE, format=".2%")]
        layers.append(line.encode(x=x, y="oracle:Q", tooltip=tooltip))
    if has_intervals(found):
        layers.append(_intervals(base, colour, when))
    points = base.mark_point(size=62, filled=True)
    layers.append(
        points.encode(
            y=_quality_axis(metric),
            color=colour,
            shape=shape,
            opacity=when.then(alt.value(1)).otherwise(alt.value(0.08)),
            tooltip=_tooltip(metric, memory),
        ).add_params(*chosen)
    )
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)


def _intervals(base: Any, colour: alt.Color, when: alt.When) -> Any:
    import altair as alt

    opacity = when.then(alt.value(0.6)).otherwise(alt.value(0.05))
    return base.mark_rule(strokeWidth=1).encode(y="low:Q", y2="high:Q", color=colour, opacity=opacity)


def _against_budget(found: pl.DataFrame, metric: str, policies: Sequence[str]) -> Any:
    memory, unit = _unit(float(found["bytes"].to_numpy().max()))
    return against_budget(
        found,
        _values(found, unit),
        looks(found, policies, leading(found, COMPARED[metric].more_is_better)),
        _quality_axis(metric),
        _tooltip(metric, memory),
        # One trace has no interval, and rules of no length would still be drawn.
        draw_intervals=has_intervals(found),
    ).properties(width=_WIDTH, height=_HEIGHT)


def against_budget(
    found: pl.DataFrame,
    values: list[dict[str, Any]],
    shown_as: tuple[alt.Color, alt.Shape, alt.StrokeDash, list[alt.Parameter], alt.When],
    y: alt.Y,
    tooltip: list[alt.Tooltip],
    draw_intervals: bool = True,
) -> Any:
    """Draw a mean against the budget, a line per policy, those of one budget side by side.

    ``found`` is of `with_budget_label`, by ascending budget, a row per policy and budget. ``values`` are
    drawn of each: policy, budget, mean, low and high (if ``draw_intervals``), and those ``tooltip`` names.
    ``shown_as`` is of `looks`, ``y`` the axis of the mean.
    """
    import altair as alt

    colour, shape, dash, chosen, when = shown_as
    own = ordered_policies(found["policy"].to_list())
    budgets = found["budget"].unique(maintain_order=True).to_list()
    x = alt.X("budget:N", sort=budgets, title="budget, per KV head", axis=alt.Axis(labelAngle=0))
    offset = alt.XOffset("policy:N", scale=alt.Scale(domain=own, padding=0.8))
    base = alt.Chart(alt.Data(values=values)).encode(x=x, xOffset=offset)
    layers = [_intervals(base, colour, when)] if draw_intervals else []
    if len(budgets) > 1:
        opacity = when.then(alt.value(0.7)).otherwise(alt.value(0.05))
        lines = base.mark_line(strokeWidth=1.2)
        layers.append(lines.encode(y=y, color=colour, strokeDash=dash, opacity=opacity))
    points = base.mark_point(size=46, filled=True)
    opacity = when.then(alt.value(1)).otherwise(alt.value(0.08))
    points = points.encode(y=y, color=colour, shape=shape, opacity=opacity, tooltip=tooltip)
    return alt.layer(*layers, points.add_params(*chosen))
