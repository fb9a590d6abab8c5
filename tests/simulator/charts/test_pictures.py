"""Charts of plain tables can be drawn and show every number, and notebooks show them as pictures."""

import altair as alt
import numpy as np
import polars as pl
import pytest
import vl_convert

from simulator.cells import run_replay
from simulator.charts.notebook import use_plain_outputs
from simulator.charts.pictures import front_chart, kept_text_chart, layer_chart
from simulator.charts.style import styled
from simulator.report.quality import quality_rows


def drawn(chart):
    return vl_convert.vegalite_to_svg(styled(chart).to_dict())


@pytest.mark.slow
def test_layers_are_drawn_by_series():
    chart = layer_chart({"wave": [3, 1, 2], "sample": np.array([4.0, 2, 1])}, "Demand")
    svg = drawn(chart)
    assert all(word in svg for word in ("wave", "sample", "Demand", "entries per KV head"))
    values = chart.to_dict()["data"]["values"]
    assert [value["value"] for value in values] == [3, 1, 2, 4, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["mass_mean", "lost_lookup_rate"])
def test_a_front_is_drawn_and_a_bound_only_of_mass(make_trace, metric):
    policies = ["random:buffer=4", "snapkv:window=4,buffer=4"]
    rows = run_replay([make_trace(), make_trace()], policies, [12, 16]).table
    svg = drawn(front_chart(quality_rows(rows, metric), metric, "A front"))
    assert all(word in svg for word in ("A front", "random", "snapkv"))
    assert ("Dashed" in svg) == (metric == "mass_mean")


def test_words_are_drawn_on_shades():
    share = np.linspace(0, 1, 70)
    pieces = [f" word{i}" for i in range(70)]
    svg = drawn(kept_text_chart(pieces, {"first": share, "second": share / 2}, 10, 65))
    assert svg.count(">word10<") == svg.count(">word64<") == 2
    assert "word9<" not in svg
    assert "word65" not in svg


def test_nothing_kept_can_be_drawn():
    assert "word" in drawn(kept_text_chart(["word"] * 3, {"none": np.zeros(3)}, 0, 3))


def test_outputs_are_pictures_and_plain_tables():
    before = alt.renderers.active
    with pl.Config():
        use_plain_outputs()
        try:
            shown = styled(layer_chart({"wave": [3, 1]}, "Demand"))._repr_mimebundle_()
            assert list(shown) == ["image/svg+xml"]
            assert 'aria-label="layer' not in shown["image/svg+xml"]
            assert str(pl.DataFrame({"a": [1.0]})).splitlines()[0] == "| a      |"
        finally:
            alt.renderers.enable(before)
