"""Charts of the stored results: the waves of the models, and the divergence of every policy."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np
import polars as pl

from simulator.charts.style import COLOURS, DASHES, over_plot
from simulator.policies.wave import Wave

_WIDTH, _HEIGHT = 300, 220
_POINT = ("predicted", "kl_mean", "is_judged")


def wave_chart(waves: Mapping[str, Mapping[str, Wave]]) -> alt.HConcatChart:
    """Draw the demand of every layer against its depth, a panel per model and a line per kind of text.

    ``waves`` are by model and kind of text.
    """
    kinds = list(dict.fromkeys(kind for own in waves.values() for kind in own))
    scale = alt.Scale(domain=kinds, range=COLOURS[: len(kinds)])
    dashes = alt.Scale(domain=kinds, range=DASHES[: len(kinds)])
    panels = []
    for i, (model, own) in enumerate(waves.items()):
        values = [
            {"layer": layer, "kind": kind, "demand": float(demand / np.mean(wave.demand))}
            for kind, wave in own.items()
            for layer, demand in enumerate(wave.demand)
        ]
        n_layers = len(next(iter(own.values())).demand)
        chart = (
            alt.Chart(alt.Data(values=values))
            .mark_line(point=alt.OverlayMarkDef(size=14))
            .encode(
                x=alt.X("layer:Q", scale=alt.Scale(domain=[0, n_layers - 1]), axis=alt.Axis(tickMinStep=1)),
                y=alt.Y("demand:Q", title="demand, of the mean" if i == 0 else None),
                color=alt.Color("kind:N", scale=scale, legend=alt.Legend(title="text")),
                strokeDash=alt.StrokeDash("kind:N", scale=dashes, legend=None),
            )
        )
        panels.append(chart.properties(width=_WIDTH, height=_HEIGHT, title=over_plot(model)))
    return alt.hconcat(*panels, spacing=24)


def divergence_chart(means: Mapping[str, pl.DataFrame]) -> alt.HConcatChart:
    """Draw the mean divergence of every policy, a panel per model and a colour per budget.

    ``means`` are by model: policy, budget, budget_asked in percent of the full cache, and kl_mean. Policies
    are in the order of their geometric means over the budgets of the first model.
    """
    first = next(iter(means.values()))
    order = first.group_by("policy").agg(pl.col("kl_mean").log().mean()).sort("kl_mean")["policy"].to_list()
    budgets = first.sort("budget_asked")["budget"].unique(maintain_order=True).to_list()
    colour = alt.Color(
        "budget:N",
        scale=alt.Scale(domain=budgets, range=[COLOURS[i % len(COLOURS)] for i in range(len(budgets))]),
        legend=alt.Legend(title="budget"),
    )
    shape = alt.Shape("budget:N", scale=alt.Scale(domain=budgets), legend=alt.Legend(title="budget"))
    panels = []
    for i, (model, own) in enumerate(means.items()):
        found = own["kl_mean"].to_numpy()
        low, high = float(found.min()), float(found.max())
        x = alt.X(
            "kl_mean:Q",
            title="KL divergence, nats a step",
            scale=alt.Scale(type="log", domain=[0.8 * low, 1.25 * high], nice=False),
            axis=alt.Axis(
                values=[n * 10.0**e for e in (-3, -2, -1, 0) for n in (1, 2, 5)],
                format="~g",
                labelOverlap="greedy",
                labelSeparation=6,
            ),
        )
        axis = alt.Axis(labels=i == 0, ticks=i == 0, grid=True)
        y = alt.Y("policy:N", sort=order, title=None, axis=axis)
        values = own.select("policy", "budget", "kl_mean").to_dicts()
        base = alt.Chart(alt.Data(values=values)).encode(x=x, y=y)
        chart = base.mark_point(filled=True, size=60, opacity=1).encode(color=colour, shape=shape)
        panels.append(chart.properties(width=240, height=17 * len(order), title=over_plot(model)))
    return alt.hconcat(*panels, spacing=16)


def predicted_chart(means: Mapping[str, pl.DataFrame]) -> alt.HConcatChart:
    """Draw measured against predicted divergence, a panel per model, a colour per budget, a point per policy.

    ``means`` are by model: policy, budget, predicted and kl_mean in nats a step, and is_judged, whether the
    prediction is of a policy that it was not made on.
    """
    every = pl.concat(own.select("budget", "kl_mean") for own in means.values())
    # From the least cache to the most.
    budgets = (
        every.group_by("budget").agg(pl.col("kl_mean").mean()).sort("kl_mean", descending=True)["budget"]
    )
    colour = alt.Color(
        "budget:N",
        scale=alt.Scale(domain=budgets.to_list(), scheme="turbo"),
        legend=alt.Legend(title="budget"),
    )
    panels = []
    for i, (model, own) in enumerate(means.items()):
        found = own.select("predicted", "kl_mean").to_numpy()
        ends = [0.8 * float(found.min()), 1.25 * float(found.max())]
        scale = alt.Scale(type="log", domain=ends, nice=False)
        ticks = alt.Axis(
            values=[n * 10.0**e for e in (-3, -2, -1, 0) for n in (1, 2, 5)],
            format="~g",
            labelOverlap="greedy",
        )
        x = alt.X("predicted:Q", title="predicted, nats a step", scale=scale, axis=ticks)
        y = alt.Y("kl_mean:Q", title="measured" if i == 0 else None, scale=scale, axis=ticks)
        equal = alt.Data(values=[{"predicted": end, "kl_mean": end} for end in ends])
        diagonal = alt.Chart(equal).mark_line(color="#888888", strokeWidth=1).encode(x=x, y=y)
        base = alt.Chart(alt.Data(values=own.select("policy", "budget", *_POINT).to_dicts()))
        points = base.encode(x=x, y=y, color=colour)
        chart = alt.layer(
            diagonal,
            points.transform_filter("!datum.is_judged").mark_point(size=34, filled=False, strokeWidth=1.2),
            points.transform_filter("datum.is_judged").mark_point(size=46, filled=True, opacity=1),
        )
        panels.append(chart.properties(width=250, height=250, title=over_plot(model)))
    return alt.hconcat(*panels, spacing=16)
