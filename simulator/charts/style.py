"""How every chart of this project looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulator.results.metric_names import COMPARED

if TYPE_CHECKING:
    import altair as alt

# Safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FULL_CACHE = "fullkv"
CONTROLS = ("random", "random-prompt")
CONTROL_COLOUR = "#9a9a9a"
# Told apart by colour, by marker and by dashes.
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
    # A star and an hourglass.
    "M0,.5L.6,.8L.5,.1L1,-.3L.3,-.4L0,-1L-.3,-.4L-1,-.3L-.5,.1L-.6,.8L0,.5Z",
    "M-.8,-.9L.8,-.9L-.8,.9L.8,.9Z",
)
DASHES = (
    [1, 0],
    [6, 2],
    [2, 2],
    [8, 2, 2, 2],
    [4, 1],
    [10, 3],
    [1, 3],
    [5, 1, 1, 1],
    [12, 2, 2, 2, 2, 2],
    [3, 3, 9, 3],
)
# What columns of the results are called where people read them.
METRIC_NAMES = {metric.column: metric.label for metric in COMPARED.values()}


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


def over_plot(title: str, subtitle: str | list[str] = "") -> alt.TitleParams:
    """Start a title at the left edge of the plot, not of its axis labels."""
    # An optional extra: the simulator has to load without it.
    import altair as alt

    return alt.TitleParams(title, subtitle=subtitle, frame="group", fontSize=12)


def ordered_policies(names: list[str]) -> list[str]:
    """List evicting policies once each, as they came, the random controls last."""
    evicting = [name for name in dict.fromkeys(names) if name != FULL_CACHE]
    return sorted(evicting, key=lambda name: name in CONTROLS)


def policy_looks(policies: list[str], legend: alt.Legend) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
    """Give every policy a colour, a marker and dashes; the random controls are grey."""
    import altair as alt

    evicting = [policy for policy in policies if policy not in CONTROLS]
    colours = [
        CONTROL_COLOUR if policy in CONTROLS else COLOURS[evicting.index(policy) % len(COLOURS)]
        for policy in policies
    ]
    return (
        cycled(alt.Color, "policy:N", policies, colours, legend),
        cycled(alt.Shape, "policy:N", policies, SHAPES, legend),
        cycled(alt.StrokeDash, "policy:N", policies, DASHES, legend),
    )


def cycled(kind: Any, field: str, names: Sequence[Any], looks: Sequence[Any], legend: alt.Legend) -> Any:
    """Return a channel that gives names their looks, the first again after the last."""
    import altair as alt

    chosen = [looks[i % len(looks)] for i in range(len(names))]
    return kind(field, scale=alt.Scale(domain=list(names), range=chosen), legend=legend)
