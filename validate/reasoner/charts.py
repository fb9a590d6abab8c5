"""Draw accuracy against budget, the demand profile and attention maps as SVG.

``python -m validate.reasoner.charts --budgets budgets.jsonl --profile profile.json --out DIR``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from traces.errors import UserError
from validate.reasoner.tasks import FAMILIES

FULL_CACHE = "fullkv"
CONTROLS = ("random", "random-prompt")
# Told apart by colour (safe for colour-blind readers), by marker and by dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [4, 1], [10, 3], [1, 3], [5, 1, 1, 1])
CONTROL_COLOUR = "#9a9a9a"
# Weights below this are left white: they would make the file large and cannot be seen.
FAINTEST = 0.02
# Points of one budget are moved apart by this factor, so that their intervals do not hide each other.
APART = 1.022


def accuracy_chart(rows: Sequence[dict[str, Any]]) -> alt.HConcatChart:
    """Draw exact answers against budget, one panel per family.

    Parameters
    ----------
    rows : sequence of dict
        As `validate.reasoner.budgets` writes them.

    Raises
    ------
    UserError
        If there is no row of an evicting policy, or two rows are the same point.
    """
    points = [(row["family"], row["policy"], row["budget_percent"]) for row in rows]
    twice = {point for point in points if points.count(point) > 1}
    if twice:
        family, policy, budget = min(twice)
        raise UserError(f"{family}, {policy} at {budget:g}% has several rows; allowed: one per point")
    evicting = [row for row in rows if row["policy"] != FULL_CACHE]
    if not evicting:
        raise UserError("the budgets hold no row of an evicting policy; nothing to draw")
    policies = list(dict.fromkeys(row["policy"] for row in evicting))
    policies.sort(key=lambda policy: policy in CONTROLS)
    panels = [
        _accuracy_panel([row for row in rows if row["family"] == family], family, policies, i == 0)
        for i, family in enumerate(_ordered(row["family"] for row in evicting))
    ]
    problems = sorted({row["problems"] for row in rows})
    counted = f"{problems[0]}" if len(problems) == 1 else f"{problems[0]} to {problems[-1]}"
    return alt.hconcat(*panels, spacing=26, bounds="flush").properties(
        title=alt.TitleParams(
            "Exact answers against cache budget",
            subtitle=[
                f"{counted} problems per point, bars: 95% Wilson intervals, grey: random controls; "
                "points of one budget are moved apart sideways"
            ],
        )
    )


def _accuracy_panel(
    rows: Sequence[dict[str, Any]], family: str, policies: Sequence[str], leftmost: bool
) -> Any:
    budgets = sorted({row["budget_percent"] for row in rows if row["policy"] != FULL_CACHE})
    middle = (len(policies) - 1) / 2
    values = [
        {
            "policy": row["policy"],
            "x": row["budget_percent"] * APART ** (policies.index(row["policy"]) - middle),
            **{name: 100 * row[name] for name in ("accuracy", "low", "high")},
        }
        for row in rows
        if row["policy"] in policies
    ]
    colours = [
        CONTROL_COLOUR if policy in CONTROLS else COLOURS[i % len(COLOURS)]
        for i, policy in enumerate(policies)
    ]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(policies))]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(policies))]
    legend = alt.Legend(
        title=None, orient="bottom", columns=8, symbolSize=70, symbolStrokeWidth=0, symbolOpacity=1
    )
    colour = alt.Color("policy:N", scale=alt.Scale(domain=policies, range=colours), legend=legend)
    shape = alt.Shape("policy:N", scale=alt.Scale(domain=policies, range=shapes), legend=legend)
    dash = alt.StrokeDash("policy:N", scale=alt.Scale(domain=policies, range=dashes), legend=None)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "x:Q",
            title="budget, % of the full cache",
            scale=alt.Scale(type="log", domain=[budgets[0] / 1.25, budgets[-1] * 1.25], nice=False),
            axis=alt.Axis(values=budgets, format="~g", grid=False),
        ),
        color=colour,
    )
    y = alt.Y(
        "accuracy:Q",
        title="exact answers, %" if leftmost else None,
        scale=alt.Scale(domain=[0, 100]),
        # Hidden, not left out: titles are placed above the labels, and shall all be at one height.
        axis=alt.Axis(labelOpacity=1 if leftmost else 0, values=[0, 20, 40, 60, 80, 100]),
    )
    layers = [
        base.mark_rule(strokeWidth=1, opacity=0.55).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=y, strokeDash=dash),
        base.mark_point(size=42, filled=True, opacity=1).encode(y=y, shape=shape),
    ]
    full = [100 * row["accuracy"] for row in rows if row["policy"] == FULL_CACHE]
    if full:
        rule = alt.Chart(alt.Data(values=[{"full": full[0], "text": f"full cache {full[0]:.0f}%"}]))
        layers.insert(0, rule.mark_rule(color="black", strokeWidth=1.2).encode(y="full:Q"))
        below = full[0] > 90
        text = rule.mark_text(align="left", dx=4, dy=8 if below else -6, fontSize=10, color="black")
        layers.append(text.encode(x=alt.value(0), y="full:Q", text="text:N"))
    return alt.layer(*layers).properties(width=225, height=230, title=_over_plot(family))


def demand_chart(profile: dict[str, Any]) -> alt.HConcatChart:
    """Draw the demand of every layer and KV head, one heat map per family.

    Parameters
    ----------
    profile : dict
        As `validate.reasoner.profile` writes it.
    """
    demand = profile["demand"]
    highest = max(value for found in demand.values() for row in found["entries"] for value in row)
    panels = []
    for i, family in enumerate(_ordered(demand)):
        found = demand[family]
        values = [
            {"layer": layer, "head": head, "entries": entries, "text": _three_digits(entries)}
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
        title = _over_plot(family, f"{found['problems']} problems, {found['steps']} steps")
        panels.append((cells + numbers).properties(width=44 * n_heads, height=24 * n_layers, title=title))
    heading = f"Entries that hold {100 * profile['rho']:g}% of attention, mean over decode steps"
    return alt.hconcat(*panels, spacing=20).properties(title=heading)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def map_chart(profile: dict[str, Any]) -> alt.ConcatChart:
    """Draw windows of attention of typical heads, each with its words on both axes.

    Parameters
    ----------
    profile : dict
        As `validate.reasoner.profile` writes it, with at least one map.

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
    title = _over_plot(
        f"{found['name']}: layer {found['layer']}, head {found['head']}",
        f"mass {found['mass']:.2f} over all problems; {found['shown']:.0%} of this window shown",
    )
    return alt.layer(*layers).properties(width=size * len(keys), height=size * len(queries), title=title)


def _axis(axis: dict[str, Any]) -> list[str]:
    """Label every position so that equal words stay apart: the position, a blank, the word."""
    return [f"{p} {word[:12]}" for p, word in zip(axis["positions"], axis["words"], strict=True)]


def _over_plot(title: str, subtitle: str = "") -> alt.TitleParams:
    """Start a title at the left edge of the plot, not of its axis labels."""
    return alt.TitleParams(title, subtitle=subtitle, frame="group", fontSize=12)


def _ordered(families: Any) -> list[str]:
    found = set(families)
    return [*(family for family in FAMILIES if family in found), *sorted(found - set(FAMILIES))]


def styled(chart: Any) -> Any:
    """Set fonts, sizes and a white ground; the same for every figure."""
    return (
        chart.configure(background="white", font="sans-serif", padding=8)
        .configure_title(
            fontSize=13, anchor="start", subtitleFontSize=10.5, subtitleColor="#444444", offset=8
        )
        .configure_axis(labelFontSize=11, titleFontSize=11, titleFontWeight="normal", gridColor="#e6e6e6")
        .configure_legend(labelFontSize=11, titleFontSize=11, labelLimit=0)
        .configure_view(stroke="#bbbbbb")
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw what is given: accuracy from budgets, demand and attention maps from a profile."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--budgets", type=Path, help="JSONL of validate.reasoner.budgets")
    parser.add_argument("--profile", type=Path, help="JSON of validate.reasoner.profile")
    parser.add_argument("--out", type=Path, required=True, help="folder for the SVG files")
    options = parser.parse_args(arguments)
    if options.budgets is None and options.profile is None:
        parser.error("nothing to draw; needed: --budgets, --profile or both")
    try:
        charts: dict[str, Any] = {}
        if options.budgets is not None:
            lines = options.budgets.read_text(encoding="utf-8").splitlines()
            charts["accuracy-against-budget"] = accuracy_chart([json.loads(line) for line in lines])
        if options.profile is not None:
            profile = json.loads(options.profile.read_text(encoding="utf-8"))
            charts["demand-profile"] = demand_chart(profile)
            charts["attention-maps"] = map_chart(profile)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, chart in charts.items():
            styled(chart).save(options.out / f"{name}.svg")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
