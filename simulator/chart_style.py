"""How every chart of this project looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

# Safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


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
    # An optional extra: the simulator has to load without it.
    import altair as alt

    return alt.TitleParams(title, subtitle=subtitle, frame="group", fontSize=12)
