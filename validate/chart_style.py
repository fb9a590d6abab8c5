"""How every chart of this project looks."""

from __future__ import annotations

from typing import Any

import altair as alt


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


def over_plot(title: str, subtitle: str = "") -> alt.TitleParams:
    """Start a title at the left edge of the plot, not of its axis labels."""
    return alt.TitleParams(title, subtitle=subtitle, frame="group", fontSize=12)
