"""The stored results of the pretrained models: what they are of, and that the tables say what they hold."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from simulator.policies.language import parse_policy
from simulator.policies.wave import known_waves
from simulator.results.calibration import known_calibrations
from traces.errors import UserError
from validate.models.pretrained import pretrained_models
from validate.pages.write import page_table
from validate.pretrained.charts import divergence_chart, predicted_chart, wave_chart
from validate.pretrained.judge import of_side, predicted_means, split
from validate.pretrained.stored import (
    FOUND,
    HOME,
    MODELS,
    evicting_rows,
    graded_divergence,
    graded_rows,
    mean_divergence,
    models_with,
    shifted_rows,
    stored_rows,
    waves_of,
)

LEAST_TEXTS = {"smollm2-135m": 40, "qwen2.5-coder-0.5b": 40, "qwen2.5-coder-1.5b": 16}
# At budgets other than 10% and 20%.
LEAST_ELSEWHERE = {"smollm2-135m": 33, "qwen2.5-coder-0.5b": 10, "qwen2.5-coder-1.5b": 16}
MEASURED = models_with("masked")


def cells(name):
    """Read a page's table: rows of cells by the first of each, under the head's names."""
    head, _, *lines = page_table(name).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")][1:]
    read = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {own[0].strip("`"): dict(zip(names, own[1:], strict=True)) for own in read}


def table_name(model):
    return "divergence-" + model.replace(".", "-")


def test_the_models_are_those_that_can_be_fetched():
    assert tuple(pretrained_models()) == MODELS
    with pytest.raises(
        UserError, match=r"no rows of masked are stored for 'gpt'; allowed: qwen2\.5-coder-0\.5b"
    ):
        stored_rows("masked", "gpt")


@pytest.mark.parametrize("model", MEASURED)
def test_rows_are_of_enough_long_texts_of_the_model(model):
    rows = stored_rows("masked", model)
    assert set(rows["model"]) == {model}
    texts = [json.loads(line) for line in (HOME / "texts" / f"{model}.jsonl").read_text().splitlines()]
    named = {re.sub(r"[^A-Za-z0-9._-]+", "-", text["id"]) for text in texts}
    assert {name.removesuffix(".kvtrace") for name in rows["trace"]} == named
    assert len(named) >= LEAST_TEXTS[model]
    assert rows["n_steps"].min() >= 500
    # Nothing that is judged was calibrated on.
    calibration = (HOME / "texts" / f"calibration-{model}.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in calibration}
    assert not prompts & {text["prompt"] for text in texts}
    counts = rows.group_by("policy", "policy_params", "budget").agg(pl.col("trace_id").n_unique().alias("n"))
    assert set(counts.filter(pl.col("budget").is_in(["10%", "20%"]))["n"]) == {len(named)}
    assert counts["n"].min() >= LEAST_ELSEWHERE[model]
    assert set(rows["level"]) == {"masked"}


def test_the_number_of_texts_is_told():
    found = cells("pretrained-texts")
    for model in MEASURED:
        rows = evicting_rows("masked", model)
        for (budget,), own in rows.group_by("budget"):
            assert int(found[model][budget]) == own["trace_id"].n_unique()


@pytest.mark.parametrize("model", MEASURED)
def test_the_table_of_divergence_holds_the_means(model):
    rows = evicting_rows("masked", model)
    found = cells(table_name(model))
    assert FOUND in found
    for (policy, budget), own in rows.group_by("policy", "budget"):
        told = float(found[policy][budget].strip("*"))
        assert told == pytest.approx(own["kl_mean"].mean(), abs=6e-4)
    for budget in set(rows["budget"]):
        least = min(found, key=lambda policy: float(found[policy][budget].strip("*") or np.inf))
        assert found[least][budget].startswith("**")


@pytest.mark.parametrize("model", MEASURED)
def test_levels_are_paired_differences(model):
    rows = evicting_rows("masked", model)
    lines = [line.strip("|").split("|") for line in page_table("pretrained-levels").splitlines()[2:]]
    told = {own[1].strip(): own[-1] for own in lines if own[0].strip() == model}
    assert set(told) == set(rows["budget"])
    for budget, cell in told.items():
        means = {
            policy: rows.filter(policy=policy, budget=budget)["kl_mean"].mean()
            for policy in ("rkv", "reasonalloc")
        }
        value, low, high = map(int, re.findall(r"[+-]\d+", cell))
        assert value == pytest.approx(100 * (means["reasonalloc"] / means["rkv"] - 1), abs=0.51)
        assert low <= value <= high
        assert ("**" in cell) == (low > 0 or high < 0) or 0 in (low, high)


def test_predictors_are_rank_correlations():
    found = cells("pretrained-predictors")["retained mass, mean"]
    for model in MEASURED:
        means = (
            evicting_rows("masked", model)
            .group_by("policy", "budget")
            .agg(pl.col("mass_mean", "kl_mean").mean())
        )
        over_all = spearmanr(-means["mass_mean"], means["kl_mean"]).statistic
        assert float(found[model].rpartition(" ")[2]) == pytest.approx(over_all, abs=0.006)


@pytest.mark.parametrize("model", MEASURED)
def test_shifts_are_of_the_measured_texts_and_their_calibration_ships(model):
    rows, own = shifted_rows(model), known_calibrations()[model]
    assert rows["trace"].n_unique() >= 6
    assert rows["budget"].n_unique() == 8
    assert len(rows) == len(evicting_rows("shift", model))
    fitted = of_side(rows, "fitted")
    assert len(own.text_ids) == rows["trace"].n_unique()
    assert (set(own.policies), own.n_rows) == (set(split()["policies"]["fitted"]), len(fitted))
    slope, _ = np.polyfit(*(np.log(fitted[name]) for name in ("shift_mean", "kl_mean")), 1)
    assert own.slope == pytest.approx(slope)
    predicted = [own.divergence(shift) for shift in fitted["shift_mean"]]
    assert np.mean(predicted) == pytest.approx(fitted["kl_mean"].mean())


def test_charts_are_drawn_from_them():
    predicted = {model: predicted_means(model) for model in MEASURED}
    panels = predicted_chart(predicted).to_dict()["hconcat"]
    assert [len(panel["layer"]) for panel in panels] == [3] * len(MEASURED)
    for own in predicted.values():
        assert set(own.filter("is_judged")["policy"]) == set(split()["policies"]["judged"])
    waves = {model: waves_of(model) for model in MODELS}
    assert all(set(own) == {"code", "gsm8k", "math", "prose"} for own in waves.values())
    assert len(wave_chart(waves).to_dict()["hconcat"]) == 3
    drawn = divergence_chart({model: mean_divergence(model) for model in MEASURED}).to_dict()
    assert len(drawn["hconcat"]) == len(MEASURED) >= 2


@pytest.mark.parametrize("model", MODELS)
def test_a_models_wave_ships(model):
    """High in one of the first layers, rising at the end; measured on nothing that is judged."""
    demand = np.array(known_waves()[model].demand)
    first, middle, _ = (part.mean() for part in np.array_split(demand, 3))
    assert demand[:2].max() > 1.2 * middle < 1.2 * first
    assert demand[-1] > 1.2 * middle
    if model in MEASURED:
        assert not set(known_waves()[model].trace_ids) & set(stored_rows("masked", model)["trace_id"])


def test_answers_are_counted_and_paired():
    rows = graded_rows("qwen2.5-coder-0.5b")
    found = cells("graded")
    assert found.pop("full cache")["right, %"] == "21.0"
    assert set(found) == {"rkv", "reasonalloc", "h2o", "snapkv", "random"}
    for policy, own in found.items():
        mine = rows.filter(policy=policy)
        assert len(mine) == mine["problem"].n_unique() == 200
        assert float(own["right, %"]) == pytest.approx(100 * mine["right"].mean(), abs=0.06)
        less, low, high = map(float, re.findall(r"[+-][\d.]+", own["less the full cache's, points"]))
        assert less == pytest.approx(float(own["right, %"]) - 21.0, abs=0.1)
        assert low < less < high
        for level in ("masked", "forced"):
            kept = graded_divergence("qwen2.5-coder-0.5b").filter(policy=policy, level=level)
            assert float(own[f"{level} divergence"]) == pytest.approx(kept["kl_mean"].mean(), abs=6e-4)


def test_what_a_search_found_was_measured_on_texts_that_it_had_not_seen():
    winners = json.loads((HOME / "results" / "winners-qwen2.5-coder-0.5b.json").read_text())
    lines = [line.strip("|").split("|") for line in page_table("pretrained-searched").splitlines()[2:]]
    assert len(lines) == len([own for own in winners if "reasonalloc" not in own["policy"]])
    rows = evicting_rows("searched", "qwen2.5-coder-0.5b")
    assert rows["trace"].n_unique() == 35
    known = evicting_rows("masked", "qwen2.5-coder-0.5b").join(rows.select("trace").unique(), on="trace")
    forced = evicting_rows("searched-forced", "qwen2.5-coder-0.5b")
    assert forced["trace"].n_unique() == 8
    assert not set(forced["trace"]) - set(rows["trace"])
    for budget, _, policy, _, masked, less, _, evicting, less_forced, _ in lines:
        asked = parse_policy(policy.strip(" `"))
        own = {"budget": budget.strip(), "policy": asked.name, "policy_params": asked.parameters_json}
        for divergence, difference, measured, bases in (
            (masked, less, rows, known),
            (evicting, less_forced, forced, forced),
        ):
            mean = measured.filter(**own)["kl_mean"].mean()
            assert float(divergence) == pytest.approx(mean, abs=6e-4)
            base = bases.filter(budget=own["budget"], policy="rkv")["kl_mean"].mean()
            assert float(difference.split("(")[0]) == pytest.approx(mean - base, abs=6e-4)


def test_winners_answer_the_problems_that_r_kv_answered():
    found, known = (graded_rows("qwen2.5-coder-0.5b", level) for level in ("searched-graded", "graded"))
    assert found["problem"].n_unique() == 200
    assert set(found["problem"]) == set(known["problem"])
    rkv = known.filter(policy="rkv")["right"].mean()
    *_, one, other = (
        line.strip("|").split("|") for line in page_table("pretrained-searched-right").splitlines()
    )
    for policy, right, less in (one, other):
        asked = parse_policy(policy.strip(" `"))
        share = found.filter(policy=asked.name, policy_params=asked.parameters_json)["right"].mean()
        assert float(right) == pytest.approx(100 * share, abs=0.06)
        assert float(less.split("(")[0]) == pytest.approx(100 * (share - rkv), abs=0.06)


def test_protection_is_told_of_the_same_texts():
    rows = stored_rows("protected", "qwen2.5-coder-0.5b")
    counts = Counter(rows["trace"])
    whole = rows.filter(pl.col("trace").is_in([trace for trace, n in counts.items() if n == 22]))
    assert whole["trace"].n_unique() == 9
    table = page_table("protection").splitlines()
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert head[0] == "scorer, 9 texts"
    for scorer, *told in lines:
        for protect, value in zip(head[1:], told, strict=True):
            if value:
                policy = parse_policy(f"{scorer.strip('`')}:protect={protect.strip('`')},buffer=32")
                own = whole.filter(policy=policy.name, policy_params=policy.parameters_json)
                assert len(own) == 9
                assert float(value.strip("*")) == pytest.approx(own["kl_mean"].mean(), abs=6e-4)
    assert [line[2:3] for line in lines] == [["0.059"], ["0.064"], ["**0.089**"], [""]]
