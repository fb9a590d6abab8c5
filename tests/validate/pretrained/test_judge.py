"""What is said of a number on models and policies it was not chosen on, recounted one by one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from simulator.results.metric_names import COMPARED
from validate.pretrained import judge
from validate.pretrained.stored import FOUND, MODELS, evicting_rows

POLICIES = [f"policy-{number}" for number in range(6)]
BUDGETS = ["10%", "20%", "30%"]


@pytest.fixture
def rows(monkeypatch):
    """Rows of six policies, twelve texts and three budgets, and a number that is the truth but for noise."""
    rng = np.random.default_rng(4)
    made = [
        {"policy": policy, "budget": budget, "trace_id": f"{text:02}", "kl_mean": kl}
        | {"noisy": kl + rng.normal() / 3, "wrong": -kl}
        for budget, scale in zip(BUDGETS, (3, 2, 1), strict=True)
        for place, policy in enumerate(POLICIES)
        for text in range(12)
        for kl in [scale * (1 + place / 2) * rng.uniform(0.7, 1.3)]
    ]
    table = pl.DataFrame(made).sample(fraction=1, shuffle=True, seed=1)
    monkeypatch.setattr(judge, "split", lambda: {"policies": {"judged": POLICIES, "fitted": []}})
    return table.sort("budget")


@pytest.mark.parametrize("number", ["noisy", "wrong"])
def test_a_standing_is_what_counting_gives(rows, number):
    found = judge.judged(rows, number, more_is_better=False)
    means = rows.group_by("policy", "budget").agg(pl.col("kl_mean", number).mean()).sort("policy")
    within, regret = [], []
    for budget in BUDGETS:
        own = means.filter(budget=budget)
        within.append(spearmanr(own[number], own["kl_mean"]).statistic)
        first = own.sort(number)["kl_mean"][0]
        regret.append(first / own["kl_mean"].min() - 1)
    assert found.within == pytest.approx(within)
    assert found.regret == pytest.approx(regret)
    assert found.over_all == pytest.approx(spearmanr(means[number], means["kl_mean"]).statistic)
    assert found.interval[0] <= np.mean(within) <= found.interval[1]
    right, n_pairs = found.pairs
    assert 30 < n_pairs <= 3 * len(list(combinations(POLICIES, 2)))
    assert right == 0 if number == "wrong" else right / n_pairs > 0.9


def test_more_may_be_better(rows):
    found = judge.judged(rows, "wrong", more_is_better=True)
    assert found.within == pytest.approx([1, 1, 1])
    assert found.pairs[0] == found.pairs[1]
    assert found.regret == (0, 0, 0)


def test_the_ceiling_is_what_half_of_the_texts_say_of_the_others(rows):
    found = judge.ceiling(rows, halvings=20)
    assert 0.9 < np.mean(found.within) <= 1
    assert found.pairs[0] / found.pairs[1] > 0.95
    same_text = rows.with_columns(kl_mean=pl.col("kl_mean").mean().over("policy", "budget"))
    exact = judge.ceiling(same_text, halvings=2)
    assert exact.within == pytest.approx([1, 1, 1])
    assert exact.regret == (0, 0, 0)


def test_a_text_is_predicted_from_other_texts_and_policies(monkeypatch):
    """On the text at hand, and of the policies that are judged, the divergence is another altogether."""
    known = {"fitted": POLICIES[:3], "judged": POLICIES[3:]}
    monkeypatch.setattr(judge, "split", lambda: {"policies": known})
    made = [
        {"policy": policy, "budget": "10%", "trace": text, "shift_mean": shift, "kl_mean": kl}
        for text in "abc"
        for policy, shift in zip(POLICIES, (0.1, 0.2, 0.4, 0.15, 0.3, 0.6), strict=True)
        for kl in [2 * shift**1.5 if text != "c" and policy in known["fitted"] else 7.0]
    ]
    found = judge.predicted_elsewhere(pl.DataFrame(made))
    assert sorted(found["policy"].unique()) == known["judged"]
    on_c = found.filter(trace="c")
    assert on_c["predicted"].to_list() == pytest.approx([2 * shift**1.5 for shift in on_c["shift_mean"]])
    assert (found.filter(trace="a")["predicted"] - on_c["predicted"]).abs().min() > 0.1


def test_the_split_parts_what_there_is():
    found = judge.split()
    policies, models = found["policies"], found["models"]
    known = set(evicting_rows("masked", models["judged"][0])["policy"])
    assert {*policies["fitted"], *policies["judged"]} == known
    assert FOUND in policies["judged"]
    assert not {*policies["fitted"]} & {*policies["judged"]}
    assert {*models["judged"]} < {*MODELS}
    assert not {*models["fitted"]} & {*models["judged"]}
    for opening in found["openings"]:
        assert opening["number"] in COMPARED
        assert opening["model"] in models["judged"]
