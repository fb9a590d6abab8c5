"""Charts of plain tables: demand layer by layer, what memory buys, which tokens stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from simulator.charts.style import (
    COLOURS,
    DASHES,
    SHAPES,
    cycled,
    ordered_policies,
    over_plot,
    policy_looks,
)
from simulator.results.metric_names import COMPARED

if TYPE_CHECKING:
    import altair as alt

# Tokens of a row of text, and the size of one in print.
_ROW, _WIDTH, _HEIGHT = 30, 27, 17
_PAPER, _INK = "#ffffff", "#084594"


def layer_chart(
    series: Mapping[str, Sequence[float]], title: str, unit: str = "entries per KV head"
) -> alt.LayerChart:
    """Draw one number per layer, a line for each series; ``unit`` is of the values."""
    import altair as alt

    names = list(series)
    values = [
        {"layer": layer, "name": name, "value": float(value)}
        for name, own in series.items()
        for layer, value in enumerate(own)
    ]
    legend = alt.Legend(title=None, orient="right", symbolSize=80, symbolStrokeWidth=0)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("value:Q", title=unit, axis=alt.Axis(tickCount=6)),
        color=cycled(alt.Color, "name:N", names, COLOURS, legend),
    )
    dashes = cycled(alt.StrokeDash, "name:N", names, DASHES, legend)
    shapes = cycled(alt.Shape, "name:N", names, SHAPES, legend)
    lines = base.mark_line(strokeWidth=1.8).encode(strokeDash=dashes)
    points = base.mark_point(size=46, filled=True, opacity=1).encode(shape=shapes)
    chart: Any = alt.layer(lines, points)
    return chart.properties(width=440, height=240, title=over_plot(title))


def front_chart(found: pl.DataFrame, metric: str, title: str) -> alt.LayerChart:
    """Draw quality against memory held, a mark per policy and budget, and the Pareto front.

    ``found`` has rows of ``simulator.report.quality.quality_rows``. Policies that differ in their parameters
    alone, ``rkv:alpha=0.1`` and ``rkv:alpha=0.3``, look alike.
    """
    import altair as alt

    values = [
        {"policy": row["policy"].partition(":")[0], "value": row["mean"], "oracle": row["oracle"]}
        | {"memory": row["bytes"] / 2**20, "is_front": row["is_front"], "budget": row["budget"]}
        for row in found.iter_rows(named=True)
    ]
    legend = alt.Legend(title=None, orient="right", symbolSize=70, symbolStrokeWidth=1.5, symbolLimit=0)
    colour, shape, _ = policy_looks(ordered_policies([value["policy"] for value in values]), legend)
    scale = alt.Scale(zero=False, padding=14)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("memory:Q", title="memory held on average, MiB", scale=scale)
    )
    own = COMPARED[metric]
    axis = alt.Axis(format=".3~%" if own.is_share else ".3~g", tickCount=6)
    y = alt.Y("value:Q", title=own.title, scale=scale, axis=axis)
    on_front = base.transform_filter("datum.is_front")
    layers: list[Any] = [
        on_front.mark_line(interpolate="step-after", color="#bdbdbd", strokeWidth=3).encode(y=y)
    ]
    note = (
        f"{'More' if COMPARED[metric].more_is_better else 'Less'} is better. Grey line and filled: the front"
    )
    if metric == "mass_mean" and found["oracle"].null_count() == 0:
        bound = base.transform_aggregate(
            oracle="mean(oracle)", memory="mean(memory)", groupby=["budget"]
        ).mark_line(color="black", strokeDash=[5, 4], point={"color": "black", "size": 24, "filled": True})
        layers.append(bound.encode(y="oracle:Q"))
        note += ". Dashed: the most that memory could hold"
    looks = {"y": y, "color": colour, "shape": shape}
    layers.append(base.mark_point(size=50, filled=False, strokeWidth=1.3, opacity=0.9).encode(**looks))
    layers.append(on_front.mark_point(size=70, filled=True, opacity=1).encode(**looks))
    chart: Any = alt.layer(*layers)
    return chart.properties(width=520, height=300, title=over_plot(title, note))


def kept_text_chart(
    pieces: Sequence[str], shares: Mapping[str, np.ndarray], start: int, stop: int
) -> alt.VConcatChart:
    """Draw the words of a trace, each on a ground as dark as many KV heads still hold its entry.

    ``pieces`` are the texts of all tokens, of which those from ``start`` to ``stop`` are drawn; ``shares``,
    float64 (n_tokens,) by the title of a panel, are those of the KV heads that hold each.
    """
    import altair as alt

    darkest = max(float(share[start:stop].max()) for share in shares.values()) or 1.0
    panels = [
        _text_panel(pieces[start:stop], share[start:stop], start, title, darkest)
        for title, share in shares.items()
    ]
    return alt.vconcat(*panels, spacing=14)


def _text_panel(pieces: Sequence[str], shares: np.ndarray, start: int, title: str, darkest: float) -> Any:
    import altair as alt

    values = [
        {"row": start + i - i % _ROW, "column": i % _ROW, "word": piece.strip(), "share": float(share)}
        for i, (piece, share) in enumerate(zip(pieces, shares, strict=True))
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("column:O", axis=None),
        y=alt.Y("row:O", title="token", axis=alt.Axis(ticks=False, domain=False, labelPadding=6)),
    )
    scale = alt.Scale(domain=[0, darkest], range=[_PAPER, _INK], interpolate="rgb")
    legend = alt.Legend(title="KV heads that hold it", format="%", gradientLength=110, tickCount=3)
    grounds = base.mark_rect().encode(color=alt.Color("share:Q", scale=scale, legend=legend))
    dark = alt.condition(f"datum.share > {0.5 * darkest}", alt.value("white"), alt.value("black"))
    words = base.mark_text(fontSize=10).encode(text="word:N", color=dark)
    n_rows = -(-len(pieces) // _ROW)
    return (grounds + words).properties(width=_WIDTH * _ROW, height=_HEIGHT * n_rows, title=over_plot(title))
