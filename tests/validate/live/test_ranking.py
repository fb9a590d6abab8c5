"""How well a metric ranks cells, against a count of all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_ranks import slow_kendall, slow_regrets, slow_spearman

from validate.live.fidelity import rank


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
