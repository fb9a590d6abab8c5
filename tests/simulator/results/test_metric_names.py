"""One name a number, and how far it can be trusted wherever a policy is put first."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from sweeps import write_spec

from simulator.engine.metrics import Metrics
from simulator.results.metric_names import DEFAULT_METRIC, METRICS, asked_metric, fidelity_note
from traces.errors import UserError
from validate.pages.trust import measured_fidelity, misjudged
from validate.pretrained.stored import mean_rows
from validate.reasoner.tables import MODEL, judged_rows

NOTE = "is no recommendation: when decoded with eviction on kvbudget-reasoner-v2 (2.3 M parameters)"


def test_every_number_has_one_name_and_a_column():
    assert len({own.label for own in METRICS.values()}) == len(METRICS)
    assert set(METRICS) <= set(Metrics.__dataclass_fields__)
    assert asked_metric(None) == DEFAULT_METRIC
    assert asked_metric("lost lookups, at once") == asked_metric("lost_lookup_rms") == "lost_lookup_rms"
    with pytest.raises(UserError, match="--metric is 'speed'; allowed: lost_lookup_peak, lost_lookup_rms"):
        asked_metric("speed")


def test_what_is_told_is_what_the_stored_tables_say():
    stored = json.loads((resources.files("simulator.results") / "fidelity.json").read_text())
    assert stored == measured_fidelity(), "run: sim reasoner trust"


def test_taking_the_first_by_the_default_costs_least_of_all_numbers():
    rows = pl.concat([judged_rows(), judged_rows(others=True)], how="diagonal")
    rows = rows.filter(pl.col("budget").is_in(["15%", "20%", "30%"]))
    assert set(chosen_by(DEFAULT_METRIC, rows)) <= {"rkv", "rkv+cake"}
    lost = {}
    for metric, own in METRICS.items():
        sign = 1 if own.more_is_better else -1
        regrets = [
            cells["accuracy"].max() - cells["accuracy"][int(np.argmax(sign * cells[metric].to_numpy()))]
            for _, cells in rows.group_by("family", "budget")
        ]
        lost[metric] = sum(regrets)
    assert min(lost, key=lost.get) == DEFAULT_METRIC
    assert "h2o" in misjudged()["lost_lookup_rate"]
    assert "h2o" not in misjudged()[DEFAULT_METRIC]


def chosen_by(metric, rows):
    """List the policies that a number puts first, over families and budgets."""
    sign = 1 if METRICS[metric].more_is_better else -1
    cells = [own for _, own in rows.group_by("family", "budget")]
    return [own["policy"][int(np.argmax(sign * own[metric].to_numpy()))] for own in cells]


def test_a_note_names_the_misjudged_at_hand_and_models_it_was_not_measured_on():
    note = fidelity_note("lost_lookup_rate", [MODEL], ["rkv", "h2o"])
    assert NOTE in note
    assert note.endswith("Known to rank too high: h2o.")
    assert "unmeasured" not in note
    assert "on big it is unmeasured." in fidelity_note("mass_mean", ["big", MODEL], ["rkv"])
    assert "on which it was found" in fidelity_note("lost_lookup_peak", [MODEL])


def test_on_a_pretrained_model_a_note_tells_what_its_predictions_say():
    known = measured_fidelity()["pretrained"]["qwen2.5-coder-0.5b"]["metrics"]["mass_mean"]
    low, high = known["divergence"]
    means = mean_rows("qwen2.5-coder-0.5b")
    ranks = [-spearmanr(own["mass_mean"], own["kl_mean"]).statistic for _, own in means.group_by("budget")]
    assert (low, high) == (round(min(ranks), 2), round(max(ranks), 2))
    assert known["misjudged"] == ["tova"]
    note = fidelity_note("mass_mean", iter(["qwen2.5-coder-0.5b"]), ["rkv", "h2o", "tova"])
    told = f"on qwen2.5-coder-0.5b it ranked 14 policies by their divergence at {low:.2f} to {high:.2f}"
    assert note.endswith(f"; {told}. Known to rank too high: tova.")
    beside = fidelity_note("mass_mean", ["qwen2.5-coder-0.5b", "big"], ["rkv", "h2o", "tova"])
    assert beside.endswith(f"; {told}; on big it is unmeasured. Known to rank too high: tova, h2o.")


@pytest.fixture
def several(make_trace):
    return [make_trace(model="tiny").path for _ in range(3)]


@pytest.mark.slow
def test_whoever_is_put_first_stands_beside_the_note(several, run_sim, tmp_path):
    rows = tmp_path / "rows.parquet"
    asked = ["-p", "rkv,h2o", "-b", 20, "--buffer", 5]
    traces = [part for path in several for part in ("-t", path)]
    shown = {"replay": run_sim("replay", *traces, *asked)[1]}
    assert run_sim("replay", *traces, *asked, "-o", rows)[0] == 0
    for metric in METRICS:
        shown[metric] = run_sim("results", rows, "--metric", metric)[1]
    spec = write_spec(tmp_path, traces=[str(path) for path in several], policies=["rkv", "h2o"], budgets=[20])
    assert f"--metric {DEFAULT_METRIC}" in run_sim("sweep", spec, "--jobs", 1)[2]
    for name, text in shown.items():
        words = " ".join(text.split())
        assert NOTE in words, name
        assert "on tiny it is unmeasured" in words, name
        for claim in ("best", "leads", "winner"):
            assert claim not in words, (name, claim)
