"""From single texts to accuracy, and from simulated numbers to how well they predict it."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.policies.language import parse_policy
from simulator.results.labels import told_apart
from traces.errors import UserError
from validate.live.accuracy import accuracy_table, compare, mean_interval
from validate.live.fidelity import (
    LIVE_HALF,
    METRICS,
    Cells,
    best_metric,
    fidelity_table,
    matched_cells,
    rank,
)

NOBODY = ("fullkv", "{}", None, None)


def label(policy, budget, unit="%", parameters="{}"):
    return (policy, parameters, float(budget), unit)


def live_rows(solved, family="walk", **columns):
    """Rows of a live run; ``solved`` gives, per cell, whether each problem's samples are right."""
    rows = [
        {
            "family": family,
            "problem": f"{family}-{problem}",
            "sample": sample,
            "policy": policy,
            "policy_params": parameters,
            "budget_asked": budget,
            "budget_unit": unit,
            "budget_kind": None if budget is None else "kept",
            "right": bool(right),
            "answer": "x",
            "ended": True,
            "loop_period": None,
            "n_tokens": 100,
            "diverged_at": None,
            "bytes_peak": 1000,
            "bytes_mean": 500.0,
        }
        | columns
        for (policy, parameters, budget, unit), problems in solved.items()
        for problem, samples in enumerate(problems)
        for sample, right in enumerate(samples if isinstance(samples, list) else [samples])
    ]
    types = {
        "budget_asked": pl.Float64,
        "budget_unit": pl.String,
        "budget_kind": pl.String,
        "loop_period": pl.Int32,
        "diverged_at": pl.Int32,
        "answer": pl.String,
    }
    return pl.DataFrame(rows, schema_overrides=types)


def simulated_rows(values, family="walk", metric="mass_mean", **columns):
    """Rows of a replay; ``values`` gives, per cell, the metric on each trace."""
    rows = [
        {
            "trace_id": f"{family}-{trace}",
            "family": family,
            "status": "ok",
            "policy": policy,
            "policy_params": parameters,
            "budget_asked": budget,
            "budget_unit": unit,
            "budget_kind": None if budget is None else "kept",
            metric: float(value),
        }
        | columns
        for (policy, parameters, budget, unit), own in values.items()
        for trace, value in enumerate(own)
    ]
    return pl.DataFrame(rows, schema_overrides={"family": pl.String})


# Ranking -------------------------------------------------------------------------------------------------


def slow_ranks(values):
    """Average rank of each value: how many are below it, and half of those that equal it."""
    return [sum(v < own for v in values) + sum(v == own for v in values) / 2 for own in values]


def slow_spearman(x, y):
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    x, y = slow_ranks(x), slow_ranks(y)
    dx, dy = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    product = sum(a * b for a, b in zip(dx, dy, strict=True))
    return product / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


def slow_kendall(x, y):
    """Count pairs in the same and in the opposite order; pairs tied on one side shorten that side only."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    return sum(a * b for a, b in signs) / math.sqrt(
        sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
    )


def slow_regrets(x, y):
    best = max(range(len(x)), key=lambda i: (x[i], -i))
    return max(y) - y[best]


@st.composite
def ranked_cells(draw):
    n_policies, n_budgets = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    n = n_policies * n_budgets
    numbers = st.lists(st.integers(0, 4).map(float), min_size=n, max_size=n)
    return draw(numbers), draw(numbers), [list(range(b, n, n_budgets)) for b in range(n_budgets)]


@settings(deadline=None, max_examples=60)
@given(ranked_cells())
def test_ranking_is_what_counting_pairs_gives(case):
    x, y, budgets = case
    found = rank(np.array(x), np.array(y), [np.array(cells) for cells in budgets])
    assert found.spearman == pytest.approx(slow_spearman(x, y) if len(x) > 1 else 0, abs=1e-9)
    assert found.kendall == pytest.approx(slow_kendall(x, y) if len(x) > 1 else 0, abs=1e-9)
    pairs = [([x[i] for i in cells], [y[i] for i in cells]) for cells in budgets]
    telling = [pair for pair in pairs if len(set(pair[1])) > 1]
    if not telling:
        assert all(
            math.isnan(getattr(found, name)) for name in ("spearman_within", "kendall_within", "regret")
        )
        return
    spearman, kendall = ([measure(*pair) for pair in telling] for measure in (slow_spearman, slow_kendall))
    assert found.spearman_within == pytest.approx(sum(spearman) / len(telling), abs=1e-9)
    assert found.kendall_within == pytest.approx(sum(kendall) / len(telling), abs=1e-9)
    regrets = [slow_regrets(*pair) for pair in telling]
    assert found.regret == pytest.approx(sum(regrets) / len(regrets))
    assert found.regret_most == max(regrets)


def test_a_perfect_metric_ranks_all_and_a_reversed_one_none(rng):
    accuracy = rng.permutation(12) / 12
    budgets = [np.arange(4), np.arange(4, 8), np.arange(8, 12)]
    perfect = rank(np.exp(accuracy), accuracy, budgets)
    assert (perfect.spearman, perfect.kendall) == pytest.approx((1, 1))
    assert (perfect.spearman_within, perfect.kendall_within) == pytest.approx((1, 1))
    assert (perfect.regret, perfect.regret_most) == (0, 0)
    wrong = rank(-accuracy, accuracy, budgets)
    assert (wrong.spearman, wrong.kendall) == pytest.approx((-1, -1))
    assert (wrong.spearman_within, wrong.kendall_within) == pytest.approx((-1, -1))
    spreads = [np.ptp(accuracy[cells]) for cells in budgets]
    assert (wrong.regret, wrong.regret_most) == pytest.approx((np.mean(spreads), max(spreads)))


def test_a_metric_may_rank_budgets_and_not_policies():
    accuracy = np.array([0.1, 0.2, 0.8, 0.9])
    found = rank(np.array([2.0, 1.0, 4.0, 3.0]), accuracy, [np.array([0, 1]), np.array([2, 3])])
    assert found.spearman == pytest.approx(0.6)
    assert found.spearman_within == pytest.approx(-1)
    assert found.regret == pytest.approx(0.1)


# Matching ------------------------------------------------------------------------------------------------


def test_the_same_policy_parameters_and_budget_are_one_cell():
    solved = {
        NOBODY: [1, 1, 1],
        label("rkv", 10): [1, 0, 0],
        label("rkv", 10, parameters='{"alpha": 1}'): [0, 0, 0],
        label("rkv", 10, "entries"): [0, 0, 0],
        label("snapkv", 20): [1, 1, 0],
        label("random", 20): [0, 0, 0],
    }
    values = {
        label("snapkv", 20): [0.3, 0.4],
        label("rkv", 20): [0.9, 0.9],
        label("rkv", 10): [0.1, 0.2],
    }
    live = live_rows(solved).sample(fraction=1.0, shuffle=True, seed=1)
    simulated = simulated_rows(values).reverse()
    (cells,) = matched_cells(simulated, live).values()
    assert sorted(cells.labels) == [(*label("rkv", 10), "kept"), (*label("snapkv", 20), "kept")]
    first = cells.labels.index((*label("rkv", 10), "kept"))
    assert cells.solved[first].tolist() == [1, 0, 0]
    assert cells.solved[1 - first].tolist() == [1, 1, 0]
    assert cells.simulated["mass_mean"][first].tolist() == [0.1, 0.2]
    assert cells.simulated["mass_mean"][1 - first].tolist() == [0.3, 0.4]
    assert list(cells.simulated) == ["mass_mean"]
    assert [budget.tolist() for budget in cells.budgets] == [[0], [1]]


def test_of_several_samples_the_share_is_taken():
    rows = live_rows({label("rkv", 10): [[1, 0], [1, 1], [0, 0]]})
    (cells,) = matched_cells(simulated_rows({label("rkv", 10): [0.5]}), rows).values()
    assert cells.solved.tolist() == [[0.5, 1, 0]]


@pytest.mark.parametrize(
    ("metric", "more_is_better"), [(own.column, own.more_is_better) for own in METRICS.values()]
)
def test_of_every_metric_more_predicts_better(metric, more_is_better):
    simulated = simulated_rows({label("rkv", 10): [0.25, 0.5]}, metric=metric)
    (cells,) = matched_cells(simulated, live_rows({label("rkv", 10): [1]})).values()
    sign = 1 if more_is_better else -1
    assert cells.simulated[metric].tolist() == [[0.25 * sign, 0.5 * sign]]


def test_families_are_matched_with_their_own():
    live = [
        live_rows({label("rkv", 10): [1, i]}, family) for i, family in enumerate(("walk", "machine", "code"))
    ]
    simulated = [
        simulated_rows({label("rkv", 10): [i]}, family) for i, family in enumerate(("machine", "walk"))
    ]
    cells = matched_cells(pl.concat(simulated), pl.concat(live))
    assert {family: own.solved.tolist() for family, own in cells.items()} == {
        "machine": [[1, 1]],
        "walk": [[1, 0]],
    }
    assert cells["walk"].simulated["mass_mean"].tolist() == [[1]]


def test_problems_without_a_family_are_matched():
    # A live run calls it empty; a trace has none.
    cells = matched_cells(
        simulated_rows({label("rkv", 10): [0.5]}, None), live_rows({label("rkv", 10): [1]}, "")
    )
    assert list(cells) == [""]


def test_only_problems_and_traces_of_all_cells_count():
    live = live_rows({label("rkv", 10): [1, 0, 1], label("snapkv", 10): [0, 1]})
    simulated = pl.concat(
        [
            simulated_rows({label("rkv", 10): [0.1, 0.2, 0.3]}),
            simulated_rows({label("snapkv", 10): [0.5]}),
            simulated_rows({label("snapkv", 10): [0, 0.6]}, status="error").slice(1),
        ]
    )
    (cells,) = matched_cells(simulated, live).values()
    assert cells.solved.tolist() == [[1, 0], [0, 1]]
    assert cells.simulated["mass_mean"].tolist() == [[0.1], [0.5]]


@pytest.mark.parametrize(
    ("solved", "values", "status"),
    [
        (label("rkv", 10), label("rkv", 20), "ok"),
        (label("rkv", 10), label("snapkv", 10), "ok"),
        (label("rkv", 10), label("rkv", 10, "entries"), "ok"),
        (label("rkv", 10), label("rkv", 10, parameters="{1}"), "ok"),
        (label("rkv", 10), label("rkv", 10), "error"),
        (NOBODY, label("fullkv", 10), "ok"),
    ],
)
def test_nothing_in_common_is_refused(solved, values, status):
    with pytest.raises(UserError, match="no family, policy and budget is in both"):
        matched_cells(simulated_rows({values: [0.5]}, status=status), live_rows({solved: [1]}))


def test_cells_that_share_no_problem_or_no_trace_are_refused():
    cells = [label("rkv", 10), label("snapkv", 10)]
    apart = pl.concat([live_rows({cells[0]: [1]}), live_rows({cells[1]: [1]}, problem="another")])
    simulated = pl.concat(
        [simulated_rows({cells[0]: [1]}), simulated_rows({cells[1]: [1]}, trace_id="another")]
    )
    together = simulated_rows({key: [1] for key in cells}), live_rows({key: [1] for key in cells})
    for pair in ((together[0], apart), (simulated, together[1])):
        with pytest.raises(UserError, match="in both"):
            matched_cells(*pair)


# Fidelity ------------------------------------------------------------------------------------------------


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


# Accuracy ------------------------------------------------------------------------------------------------


def test_accuracy_is_the_mean_over_problems_of_right_shares():
    rows = pl.concat(
        [
            live_rows({NOBODY: [[1, 1], [1, 1], [1, 0]]}),
            live_rows(
                {label("rkv", 10): [[1, 0], [0, 0], [0, 0]]},
                n_tokens=50,
                diverged_at=7,
                loop_period=3,
                bytes_peak=70,
                bytes_mean=60.0,
                ended=False,
            ),
            live_rows({label("rkv", 20): [[1, 0]]}, answer=None, n_tokens=10, bytes_peak=50),
            live_rows({label("rkv", 20): [[1, 1], [0, 1]]}, n_tokens=40, bytes_peak=20).slice(2),
        ]
    )
    table = accuracy_table(rows)
    assert table["family"].to_list() == ["walk"] * 3
    assert table["policy"].to_list() == ["fullkv", "rkv", "rkv"]
    assert table["budget_asked"].to_list() == [None, 10, 20]
    full, scarce, mixed = table.iter_rows(named=True)
    assert full["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert scarce["accuracy"] == pytest.approx(0.5 / 3)
    assert mixed["accuracy"] == pytest.approx(0.5)
    assert [row["n_problems"] for row in (full, scarce, mixed)] == [3, 3, 2]
    assert [row["looping"] for row in (full, scarce, mixed)] == [0, 1, 0]
    assert [row["ended"] for row in (full, scarce, mixed)] == [1, 0, 1]
    assert [row["diverged_at"] for row in (full, scarce, mixed)] == [None, 7, None]
    assert [row["answered"] for row in (full, scarce, mixed)] == [1, 1, 0.5]
    assert [row["tokens"] for row in (full, scarce, mixed)] == [100, 50, 25]
    assert [row["bytes_peak"] for row in (full, scarce, mixed)] == [1000, 70, 50]
    assert [row["bytes_mean"] for row in (full, scarce, mixed)] == [500, 60, 500]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in (full, scarce, mixed))


def test_several_families_are_also_taken_together():
    rows = pl.concat(
        [live_rows({label("rkv", 10): [1, 1]}), live_rows({label("rkv", 10): [0, 0, 0]}, "machine")]
    )
    table = accuracy_table(rows)
    assert dict(table.select("family", "accuracy").iter_rows()) == {"walk": 1, "machine": 0, "all": 0.4}
    assert accuracy_table(rows).equals(table)


def test_differences_are_taken_problem_by_problem():
    mine, theirs = [1] * 30 + [0] * 10, [1] * 20 + [0] * 20
    rows = pl.concat(
        [
            live_rows({label("a", 10): mine, label("b", 10): theirs, NOBODY: [1] * 40}),
            live_rows({label("a", 20): [1, 0]}),
            live_rows({label("a", 10): [0, 1, 1], label("b", 10): [1, 0]}, "machine"),
        ]
    )
    found = compare(rows, "a", "b")
    walk, machine = found.iter_rows(named=True)
    assert (walk["family"], walk["budget_asked"], walk["budget_unit"]) == ("walk", 10, "%")
    assert (walk["n_problems"], walk["difference"]) == (40, 0.25)
    assert 0.1 < walk["low"] < 0.15 < 0.35 < walk["high"] < 0.4  # normal: 0.25 +- 1.96 * 0.068
    assert (machine["n_problems"], machine["difference"]) == (2, 0)
    other = compare(rows, "b", "a")
    assert other["difference"].to_list() == [-0.25, 0]
    assert compare(rows, "a", "b").equals(found)


def test_policies_that_never_differ_may_differ_either_way():
    rows = live_rows({label("a", 10): [0] * 20, label("b", 10): [0] * 20})
    (row,) = compare(rows, "a", "b").iter_rows(named=True)
    assert row["difference"] == 0
    assert row["high"] == -row["low"] == pytest.approx(wilson(0, 20)[1])


def test_policies_without_a_common_budget_have_no_differences():
    rows = live_rows({label("a", 10): [1], label("b", 20): [1]})
    found = compare(rows, "a", "b")
    assert found.is_empty()
    assert found.sort("family", "budget_asked").is_empty()


def wilson(share, n, z=1.96):
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize("n", [1, 7, 128])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_values_have_wilsons_interval(rng, n, value):
    assert mean_interval(np.full(n, value), rng) == pytest.approx(wilson(value, n), abs=1e-12)


def test_an_interval_is_as_wide_as_the_spread_says(rng):
    values = np.repeat([0.0, 1.0], [60, 40])
    low, high = mean_interval(values, rng)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.015)
    bound = wilson(0, 5)[1]
    assert mean_interval(np.full(5, 0.5), rng) == pytest.approx((0.5 - bound, 0.5 + bound))
    assert mean_interval(np.zeros(5), rng, lowest=-1.0) == pytest.approx((-bound, bound))
    assert mean_interval(np.full(5, -1.0), rng, lowest=-1.0) == pytest.approx((-1, -1 + bound))


def parameters_of(*policies):
    rows = [(own.name, own.parameters_json) for own in map(parse_policy, policies)]
    return pl.DataFrame(rows, schema=["policy", "policy_params"], orient="row")


def test_policies_of_one_name_are_told_apart_by_what_differs():
    own = ["rkv", "rkv:alpha=0.2", "snapkv", "rkv:alpha=0.2,buffer=32"]
    (table,) = told_apart(parameters_of(*own, "rkv"))
    assert table["policy"].to_list() == [
        "rkv:alpha=0.1,buffer=128",
        "rkv:alpha=0.2,buffer=128",
        "snapkv",
        "rkv:alpha=0.2,buffer=32",
        "rkv:alpha=0.1,buffer=128",
    ]
    live, simulated = told_apart(parameters_of("rkv", "snapkv"), parameters_of("rkv:alpha=0.2"))
    assert live["policy"].to_list() == ["rkv:alpha=0.1", "snapkv"]
    assert simulated["policy"].to_list() == ["rkv:alpha=0.2"]


def test_policies_with_other_triggers_are_told_apart():
    own = ["rkv", "rkv:trigger=every-n,interval=16", "rkv:trigger=every-n,interval=32"]
    (table,) = told_apart(parameters_of(*own))
    assert table["policy"].n_unique() == 3
    assert "interval=32" in table["policy"][2]
