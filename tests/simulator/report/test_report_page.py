"""The page of a replay: a browser opens it, finds every chart drawn, asks no network and fits a phone."""

import json
import re

import numpy as np
import polars as pl
import pytest
from agreement import make_wave
from browser import open_page

from simulator.cells import run_replay
from simulator.report.contents import report
from simulator.report.sources import chosen
from simulator.results.metric_names import METRICS

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

POLICIES = ["fullkv", "rkv:buffer=8", "reasonalloc:buffer=8,delta=4", "random:buffer=8", "snapkv:buffer=8"]
# Text that would end a script, or be read as a tag, were it written into the page as it is.
PIECES = ("</script>", "<b>", "&amp; ", "wörd ", "\n")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    from traces import open_trace, write_trace

    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("report")
    for number in range(3):
        write_trace(
            folder / f"t{number}.kvtrace",
            rng.normal(size=(3, 4, 90, 8)),
            rng.normal(size=(3, 2, 90, 8)),
            prompt_tokens=20,
            token_ids=np.arange(90) % len(PIECES),
            vocabulary=dict(enumerate(PIECES)),
            task={"family": "even" if number % 2 == 0 else "odd"},
        )
    first = open_trace(folder / "t0.kvtrace")
    make_wave(first, [1.0, 2.0, 3.0]).write(folder / "wave.json")
    options = {"waves": [folder / "wave.json"], "keep_retained": True, "keep_trajectory": True}
    return run_replay([str(folder)], POLICIES, [24, "40%"], **options), folder


@pytest.fixture(scope="module")
def tables(replayed):
    """Write accuracy and fidelity as ``sim validate live`` does: the fewer lookups lost, the better."""
    result, folder = replayed
    rows = result.table.filter(pl.col("policy") != "fullkv")
    key = ["family", "policy", "policy_params", "budget_asked", "budget_unit"]
    accuracy = rows.group_by(key).agg(accuracy=1 - pl.col("lost_lookup_rate").mean())
    accuracy.write_csv(folder / "accuracy.csv")
    names = ("spearman", "spearman_within", "regret")
    told = [
        {"family": family, "metric": metric} | dict.fromkeys(names, 0.5)
        for family in ("even", "odd")
        for metric in METRICS
    ]
    pl.DataFrame(told).write_csv(folder / "fidelity.csv")
    return folder / "fidelity.csv", folder / "accuracy.csv"


@pytest.fixture(scope="module")
def made(replayed, tables):
    from traces import open_trace
    from validate.live.fidelity_section import fidelity_section

    result, folder = replayed
    first = open_trace(folder / "t0.kvtrace")
    own = pl.col("trace_id") == first.trace_id
    sources = chosen(result.table, result.trajectory.filter(own), result.retained.filter(own), [], [])
    metrics = ["lost_lookup_rate", "mass_mean"]
    section = fidelity_section(sources.rows, *tables, metrics)
    return report(sources, metrics, [first], section)


def data_of(page):
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def with_data(page, data):
    told = json.dumps(data).replace("<", "\\u003c")
    before, start, rest = page.partition('id="report-data">')
    return before + start + told + "</script>" + rest.partition("</script>")[2]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_without_faults(made, tmp_path, width):
    seen = open_page(made.text, tmp_path, width)
    assert seen.faults == []
    assert set(seen.marks) == {figure.name for figure in made.figures}
    # Two metrics against memory and budget, and per family against accuracy; 4 policies x 2 budgets of heads.
    assert len(seen.marks) == 2 * 2 + 2 * 2 + 3 * 8
    assert seen.marks["mass-map-cell-0"] == 6
    assert seen.smallest >= 11


@pytest.mark.slow
def test_kept_tokens_follow_the_slider(made, tmp_path):
    seen = open_page(made.text, tmp_path)
    assert len(seen.kept) == 8
    for kept in seen.kept.values():
        assert kept["text"] == "".join(PIECES) * 18
        first, last = kept["seen"]
        assert first["hidden"] == 90 - int(first["when"].split()[1])
        assert last["hidden"] == 0
        assert last["when"].startswith("After 90 of 90 tokens")
        assert "of 6 heads" in last["which"]
        assert last["shades"] > 1


@pytest.mark.slow
def test_a_broken_chart_is_noticed(made, tmp_path):
    data = data_of(made.text)
    maps = data["figures"]["mass-map-cell-0"]
    maps["data"] = {"values": []}
    maps.pop("datasets", None)
    data["figures"]["pareto-mass_mean"]["layer"][0]["mark"] = "no such mark"
    faults = open_page(with_data(made.text, data), tmp_path).faults
    assert "mass-map-cell-0 has no marks" in faults
    assert any(fault.startswith("error") for fault in faults)


@pytest.mark.slow
def test_a_request_is_noticed_and_refused(made, tmp_path):
    image = '<img src="https://example.com/x.png"></body>'
    before, _, after = made.text.rpartition("</body>")
    faults = open_page(before + image + after, tmp_path).faults
    assert any(fault.startswith("request: https://example.com") for fault in faults)


def test_the_page_is_small(made):
    # Most of it is the charts' runtime, which is there once.
    assert len(made.text.encode()) < 1.5e6
    assert made.text.count("<script") - made.text.count("<script>") == 1


def test_the_page_names_no_address_to_load(made):
    text = re.sub(r"<script.*?</script>", "", made.text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=|url\(|@import", text)
    assert "default-src 'none'" in text
    assert not any("$schema" in spec for spec in data_of(made.text)["figures"].values())


@pytest.mark.slow
def test_what_is_not_given_is_told_not_drawn(replayed, tmp_path):
    result, _ = replayed
    bare = report(chosen(result.table, None, None, [], []))
    assert {figure.name for figure in bare.figures} == {
        f"{kind}-{metric}" for kind in ("pareto", "budget") for metric in ("lost_lookup_peak",)
    }
    for option in ("--trajectory", "--retained", "--fidelity"):
        assert option in bare.text.partition("Not in this page")[2].partition("<script")[0]
    assert open_page(bare.text, tmp_path).faults == []
