"""From single texts to accuracy with its interval, and to differences between policies."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from live_tables import NOBODY, label, live_rows

from validate.live.accuracy import accuracy_table, compare, mean_interval


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
