"""Budgets meet their total exactly, keep their bounds and follow the demand."""

from __future__ import annotations

import allocating
import naive_rules
import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.policies.apportion import apportion, divide, fractions, robustify
from simulator.policies.layers.pyramid import PyramidLayers
from simulator.policies.layers.wave import WaveLayers
from simulator.policies.parts import LayerRequest
from simulator.policies.wave import Wave
from traces.errors import InfeasibleBudgetError, MissingDataError

BOUNDS = {"exponent": 0.5, "floor": 0.25, "cap": 2.0}

demands = st.lists(
    st.one_of(st.just(0.0), st.integers(0, 50).map(float), st.floats(0, 1e6), st.sampled_from([1e-6, 1e9])),
    min_size=1,
    max_size=12,
)


@st.composite
def requests(draw):
    """Draw a demand, a total and a protected count that the total can hold."""
    demand = draw(demands)
    protected = draw(st.integers(0, 20))
    total = len(demand) * (protected + draw(st.integers(0, 200))) + draw(st.integers(0, len(demand) - 1))
    return demand, total, protected


def bounds_of(n, total, protected, floor=0.25, cap=2.0):
    mean = total / n
    lower = max(min(int(np.ceil(floor * mean)), total // n), protected)
    return lower, max(int(np.floor(cap * mean)), -(-total // n))


@given(requests())
@MODERATE
def test_robustify_meets_the_total_within_the_bounds(request):
    demand, total, protected = request
    budgets, _ = robustify(np.array(demand), total, protected=protected, **BOUNDS)
    lower, upper = bounds_of(len(demand), total, protected)
    assert budgets.dtype == np.int64
    assert budgets.sum() == total
    assert budgets.min() >= lower
    assert budgets.max() <= upper


@given(requests(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 1.0]))
@MODERATE
def test_robustify_is_the_twin(request, exponent, floor):
    demand, total, protected = request
    demand = [round(value, 3) for value in demand if value <= 1e6] or [1.0]
    total = max(total, protected * len(demand))
    budgets, _ = robustify(
        np.array(demand), total, exponent=exponent, floor=floor, cap=2.0, protected=protected
    )
    assert budgets.tolist() == naive_rules.robustify(demand, total, exponent, floor, 2.0, protected)


@given(requests(), st.data())
@MODERATE
def test_robustify_follows_the_demand(request, data):
    demand, total, protected = request
    budgets, _ = robustify(np.array(demand), total, protected=protected, **BOUNDS)
    # Less than a billionth of the largest demand counts as a billionth.
    demand = [max(value, max(demand) * 1e-9) for value in demand]
    for i in range(len(demand)):
        for j in range(len(demand)):
            if demand[i] > demand[j]:
                assert budgets[i] >= budgets[j]
            if demand[i] == demand[j]:
                # Equal demands differ by rounding alone, and it favours the lower index.
                assert 0 <= budgets[min(i, j)] - budgets[max(i, j)] <= 1
    i = data.draw(st.integers(0, len(demand) - 1))
    more = demand.copy()
    more[i] = demand[i] * 1.5 + 1
    raised, _ = robustify(np.array(more), total, protected=protected, **BOUNDS)
    if max(demand) > 0:  # without any demand, all count as equal
        assert raised[i] >= budgets[i]


def test_robustify_by_hand():
    # Square roots 1, 2, 3, 6 scale to 6.7, 13.3, 20, 40; none lies outside 5..40.
    budgets, binding = robustify(np.array([1.0, 4, 9, 36]), 80, protected=0, **BOUNDS)
    assert budgets.tolist() == [7, 13, 20, 40]
    assert not binding
    # The largest is capped at 40 and the rest share what it cannot take.
    budgets, _ = robustify(np.array([1.0, 1, 1, 900]), 80, protected=0, **BOUNDS)
    assert budgets.tolist() == [14, 13, 13, 40]


def test_robustify_says_when_protection_binds():
    budgets, binding = robustify(np.array([0.0, 1, 100]), 60, protected=12, **BOUNDS)
    assert budgets.min() == 12
    assert binding
    _, binding = robustify(np.array([1.0, 1, 1]), 60, protected=12, **BOUNDS)
    assert not binding


@pytest.mark.parametrize("demand", [[0.0, 0, 0], [5.0, 5, 5]])
def test_robustify_treats_equals_alike(demand):
    budgets, _ = robustify(np.array(demand), 20, protected=1, **BOUNDS)
    assert budgets.tolist() == [7, 7, 6]


def test_robustify_refuses_what_cannot_be_met():
    with pytest.raises(InfeasibleBudgetError, match="at least 36"):
        robustify(np.ones(3), 35, protected=12, **BOUNDS)
    for demand in ([1.0, np.nan], [1.0, -1.0], [1.0, np.inf]):
        with pytest.raises(ValueError, match="finite and not negative"):
            robustify(np.array(demand), 10, protected=0, **BOUNDS)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=10).filter(any), st.integers(0, 500))
@MODERATE
def test_apportion_rounds_by_largest_remainder(parts, total):
    # Exact in integers: shares total * part / sum, remainders compared as whole numbers.
    whole = [total * part // sum(parts) for part in parts]
    remainders = [total * part % sum(parts) for part in parts]
    for i in sorted(range(len(parts)), key=lambda i: (-remainders[i], i))[: total - sum(whole)]:
        whole[i] += 1
    shares = np.array(parts) * total / sum(parts)
    rounded = apportion(shares, total)
    assert rounded.sum() == total
    assert np.abs(rounded - shares).max() < 1 + 1e-6
    if len(set(remainders)) == len(remainders):
        assert rounded.tolist() == whole


def test_apportion_gives_ties_to_the_lower_index():
    assert apportion(np.array([1.5, 1.5, 1.5, 1.5]), 6).tolist() == [2, 2, 1, 1]


def layer_request(n_layers, entries, protected, demand=None):
    waves = {}
    if demand is not None:
        waves["m"] = Wave("m", "", 0.93, tuple(demand), tuple((value,) for value in demand), (), 1)
    return LayerRequest(n_layers, entries, protected, "m", "", "", waves)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 300), st.sampled_from([1.0, 2.5, 20.0]))
@MODERATE
def test_pyramid_is_the_twin(n_layers, protected, evictable, beta):
    entries = protected + evictable
    budgets, _ = PyramidLayers(pyramid_beta=beta).allocate(layer_request(n_layers, entries, protected))
    rules = naive_rules.Rules(layers="pyramid", pyramid_beta=beta, recent=protected)
    assert budgets.tolist() == naive_rules.layer_budgets(rules, n_layers, entries, None)
    assert budgets.sum() == n_layers * entries
    assert (np.diff(budgets) <= 0).all()
    assert budgets.min() >= protected


def test_pyramid_by_hand():
    # 20 evictable entries on average: from 39 in the first layer down to 1 in the last.
    budgets, _ = PyramidLayers().allocate(layer_request(3, 28, 8))
    assert budgets.tolist() == [47, 28, 9]


@given(demands, st.integers(0, 12), st.integers(1, 300))
@MODERATE
def test_wave_is_the_twin(demand, protected, evictable):
    demand = [round(value, 3) for value in demand if value <= 1e6] or [1.0]
    entries = protected + evictable
    budgets, _ = WaveLayers().allocate(layer_request(len(demand), entries, protected, demand))
    rules = naive_rules.Rules(layers="wave", recent=protected)
    assert budgets.tolist() == naive_rules.layer_budgets(rules, len(demand), entries, demand)
    assert budgets.sum() == len(demand) * entries


def test_wave_of_another_shape_or_model_is_refused():
    with pytest.raises(MissingDataError):
        WaveLayers().allocate(layer_request(4, 20, 8, [1.0, 2, 3]))
    with pytest.raises(MissingDataError, match="'m'"):
        WaveLayers().allocate(layer_request(4, 20, 8))


@given(allocating.demands)
@MODERATE
def test_fractions_sum_to_one(weights):
    found = fractions(np.array(weights))
    assert abs(found.sum() - 1) < 1e-9
    assert (found >= 0).all()


def test_shares_equal_but_for_rounding_errors_are_ties():
    # 10.4 - 10 exceeds 3.4 - 3 in floats.
    assert divide(np.array([3.4, 10.4, 6.2]), 20).tolist() == [4, 10, 6]
