"""Charts of a profile, as `sim reasoner profile` writes it: demand and attention maps."""

from __future__ import annotations

from typing import Any

import altair as alt

from simulator.charts.style import over_plot
from traces.errors import UserError

# Weights below this are left white: they would make the file large and cannot be seen.
FAINTEST = 0.02


def demand_chart(profile: dict[str, Any]) -> alt.HConcatChart:
    """Draw the demand of every layer and KV head in a profile, one heat map per family."""
    demand = profile["demand"]
    highest = max(value for found in demand.values() for row in found["entries"] for value in row)
    panels = []
    for i, (family, found) in enumerate(demand.items()):
        values = [
            {"layer": layer, "head": head, "entries": entries, "text": f"{entries:.{int(entries < 10)}f}"}
            for layer, row in enumerate(found["entries"])
            for head, entries in enumerate(row)
        ]
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("head:O", title="KV head", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("layer:O", title="layer" if i == 0 else None),
        )
        scale = alt.Scale(scheme="blues", domain=[0, highest])
        legend = alt.Legend(title="entries", gradientLength=120)
        cells = base.mark_rect(stroke="white").encode(
            color=alt.Color("entries:Q", scale=scale, legend=legend)
        )
        dark = alt.condition(f"datum.entries > {0.55 * highest}", alt.value("white"), alt.value("black"))
        numbers = base.mark_text(fontSize=11).encode(text="text:N", color=dark)
        n_layers, n_heads = len(found["entries"]), len(found["entries"][0])
        title = over_plot(family, f"{found['problems']} problems, {found['steps']} steps")
        panels.append((cells + numbers).properties(width=44 * n_heads, height=24 * n_layers, title=title))
    heading = f"Entries that hold {100 * profile['rho']:g}% of attention, mean over decode steps"
    return alt.hconcat(*panels, spacing=20).properties(title=heading)


def map_chart(profile: dict[str, Any]) -> alt.ConcatChart:
    """Draw a profile's windows of attention of typical heads, each with its words on both axes.

    Raises
    ------
    UserError
        If no head has a name that is drawn.
    """
    maps = profile["maps"]
    if not maps["heads"]:
        raise UserError("the profile holds no attention map: no head has a name that is drawn")
    panels = [_map_panel(found, maps["prompt_tokens"]) for found in maps["heads"]]
    title = alt.TitleParams(
        f"What typical heads attend to: the last decode steps of {maps['problem'] or 'a trace'}",
        subtitle=[
            "Rows: current token, downwards. Columns: the tokens attended to, in order; the line divides "
            "prompt and chain. Tokens that get next to nothing are left out."
        ],
    )
    return alt.concat(*panels, columns=2, spacing=24).properties(title=title)


def _map_panel(found: dict[str, Any], prompt_tokens: int) -> Any:
    queries, keys = _axis(found["queries"]), _axis(found["keys"])
    values = [
        {"query": queries[i], "key": keys[j], "weight": weight}
        for i, row in enumerate(found["weights"])
        for j, weight in enumerate(row)
        if weight >= FAINTEST
    ]
    # The words are what remains of a label after its position.
    words = "substring(datum.label, indexof(datum.label, ' ') + 1)"
    axis: dict[str, Any] = {
        "labelExpr": words,
        "labelFontSize": 10,
        "labelPadding": 2,
        "ticks": False,
        "labelOverlap": False,
    }
    x = alt.X("key:N", title=None, axis=alt.Axis(labelAngle=-90, **axis), scale=alt.Scale(domain=keys))
    y = alt.Y("query:N", title=None, axis=alt.Axis(**axis), scale=alt.Scale(domain=queries))
    legend = alt.Legend(title="weight", gradientLength=120)
    scale = alt.Scale(range=["#e3eef9", "#4292c6", "#08306b"], domain=[0, 0.5, 1])
    colour = alt.Color("weight:Q", scale=scale, legend=legend)
    layers = [alt.Chart(alt.Data(values=values)).mark_rect().encode(x=x, y=y, color=colour)]
    in_prompt = sum(position < prompt_tokens for position in found["keys"]["positions"])
    size = 11
    if 0 < in_prompt < len(keys):
        divide = alt.Chart(alt.Data(values=[{}])).mark_rule(color="#d55e00", strokeWidth=1.2)
        layers.append(divide.encode(x=alt.value(in_prompt * size)))
    title = over_plot(
        f"{found['name']}: layer {found['layer']}, head {found['head']}",
        f"mass {found['mass']:.2f} over all problems; {found['shown']:.0%} of this window shown",
    )
    return alt.layer(*layers).properties(width=size * len(keys), height=size * len(queries), title=title)


def _axis(axis: dict[str, Any]) -> list[str]:
    """Label every position so that equal words stay apart: the position, a blank, the word."""
    return [f"{p} {word[:12]}" for p, word in zip(axis["positions"], axis["words"], strict=True)]
