"""How well simulated numbers predict accuracy, with intervals that hold the figures."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from live_tables import label
from naive_ranks import slow_kendall, slow_spearman

from validate.live.fidelity import LIVE_HALF, Cells, best_metric, fidelity_table


def made_cells(rng, n_problems=60, n_traces=8, noise=0.02, metric="mass_mean"):
    """Cells of four policies at three budgets whose accuracy rises with the metric."""
    labels = [label(policy, budget) for budget in (10, 20, 30) for policy in "abcd"]
    quality = np.array([0.1 + 0.05 * i + 0.2 * b for b in range(3) for i in range(4)])
    solved = (rng.random((12, n_problems)) < quality[:, None]).astype(float)
    return Cells(labels, {metric: quality[:, None] + noise * rng.normal(size=(12, n_traces))}, solved)


def test_fidelity_measures_the_means_and_its_intervals_hold_them(rng):
    cells = made_cells(rng)
    table = fidelity_table({"walk": cells}, resamples=100)
    row = table.row(0, named=True)
    assert (row["family"], row["metric"]) == ("walk", "mass_mean")
    assert [row[name] for name in ("n_cells", "n_budgets", "n_problems", "n_traces")] == [12, 3, 60, 8]
    x = [sum(own) / 8 for own in cells.simulated["mass_mean"].tolist()]
    y = [sum(own) / 60 for own in cells.solved.tolist()]
    assert row["spearman"] == pytest.approx(slow_spearman(x, y), abs=1e-9)
    assert row["kendall"] == pytest.approx(slow_kendall(x, y), abs=1e-9)
    for name in ("spearman", "kendall", "spearman_within", "kendall_within", "regret", "regret_most"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row[f"{name}_low"] < row[f"{name}_high"]


@pytest.mark.slow
def test_fidelity_is_reproducible_by_seed(rng):
    cells = {"walk": made_cells(rng)}
    first, again, other = (fidelity_table(cells, resamples=40, seed=seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)
    assert first["spearman"][0] == other["spearman"][0]


def test_every_metric_meets_the_same_resamples(rng):
    cells = made_cells(rng)
    cells.simulated["mass_p05"] = cells.simulated["mass_mean"] * 3 + 1
    table = fidelity_table({"walk": cells}, resamples=40)
    same = table.filter(pl.col("metric") != LIVE_HALF).drop("metric")
    assert same.row(0) == pytest.approx(same.row(1), abs=1e-9)


def test_half_of_the_problems_predict_the_other_half(rng):
    alike = made_cells(rng, n_problems=40)
    alike.solved[:] = np.linspace(0, 1, 12)[:, None]
    halves = fidelity_table({"walk": alike}, resamples=40).row(
        by_predicate=pl.col("metric") == LIVE_HALF, named=True
    )
    assert halves["spearman"] == pytest.approx(1)
    assert (halves["regret"], halves["regret_most"]) == (0, 0)
    noisy = fidelity_table({"walk": made_cells(rng, n_problems=40)}, resamples=40)
    halves = noisy.row(by_predicate=pl.col("metric") == LIVE_HALF, named=True)
    assert halves["spearman_within_low"] < halves["spearman_within"] < halves["spearman_within_high"] <= 1
    assert halves["regret"] > 0
    one = made_cells(rng, n_problems=1)
    assert fidelity_table({"walk": one}, resamples=5)["metric"].to_list() == ["mass_mean"]


@pytest.mark.parametrize("right", [0, 1])
def test_where_all_policies_are_equal_nothing_is_said_and_nobody_warned(rng, right):
    cells = made_cells(rng)
    cells.solved[:] = right
    row = fidelity_table({"walk": cells}, resamples=10).row(0, named=True)
    assert (row["spearman"], row["kendall"], row["spearman_low"]) == (0, 0, 0)
    assert math.isnan(row["spearman_within"])
    assert math.isnan(row["regret_low"])


def test_halves_that_tell_nothing_apart_are_left_out(rng):
    cells = made_cells(rng, n_problems=6)
    cells.solved[:] = 0
    cells.solved[0, 0] = 1  # half of the time on the side that predicts
    row = fidelity_table({"walk": cells}, resamples=30).row(1, named=True)
    assert row["metric"] == LIVE_HALF
    assert row["spearman_within"] == 0


def test_the_best_metric_is_of_the_simulator_and_of_telling_families():
    rows = [
        ("walk", "mass_mean", 0.5),
        ("walk", "miss_rate", 0.9),
        ("walk", LIVE_HALF, 1.0),
        ("code", "mass_mean", 0.7),
        ("code", "miss_rate", 0.2),
        ("code", LIVE_HALF, 1.0),
        ("idle", "mass_mean", math.nan),
        ("idle", "miss_rate", math.nan),
    ]
    table = pl.DataFrame(rows, schema=["family", "metric", "spearman_within"], orient="row")
    assert best_metric(table) == "mass_mean"
    assert best_metric(table.filter(family="walk")) == "miss_rate"
    assert best_metric(table.filter(pl.col("family") != "code")) == "miss_rate"
    assert best_metric(table.filter(family="idle")) == "mass_mean"
