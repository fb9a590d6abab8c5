"""Charts of the stored results: the waves of the models, and the divergence of every policy."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np
import polars as pl

from simulator.charts.style import COLOURS, DASHES, ordered_policies, over_plot, policy_looks
from simulator.policies.wave import Wave

_WIDTH, _HEIGHT = 300, 220


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
    """Draw the mean divergence against the budget, a panel per model and a line per policy.

    ``means`` are by model: policy, budget_asked in percent of the full cache, and kl_mean.
    """
    policies = ordered_policies([policy for own in means.values() for policy in own["policy"]])
    looks = policy_looks(policies, alt.Legend(title="policy", symbolLimit=0))
    panels = []
    for i, (model, own) in enumerate(means.items()):
        budgets = own["budget_asked"].unique().sort().to_list()
        x = alt.X(
            "budget_asked:Q",
            title="budget, % of the full cache",
            scale=alt.Scale(type="log", domain=[0.8 * budgets[0], 1.25 * budgets[-1]]),
            axis=alt.Axis(values=budgets, grid=False),
        )
        title = "KL divergence, nats a step" if i == 0 else None
        y = alt.Y("kl_mean:Q", title=title, scale=alt.Scale(type="log"))
        values = own.select("policy", "budget_asked", "kl_mean").to_dicts()
        base = alt.Chart(alt.Data(values=values)).encode(x=x, y=y, color=looks[0])
        points = base.mark_point(filled=True, size=36).encode(shape=looks[1])
        chart = base.mark_line().encode(strokeDash=looks[2]) + points
        panels.append(chart.properties(width=_WIDTH, height=_HEIGHT, title=over_plot(model)))
    return alt.hconcat(*panels, spacing=24)
