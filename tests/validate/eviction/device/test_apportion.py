"""Head budgets divided on the device, against the one division of the simulator."""

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.policies.apportion import robustify
from validate.eviction.device.apportion import divide_heads


def _both(demand, totals, **settings):
    pairs = zip(demand.astype(float), totals.tolist(), strict=True)
    expected = np.array([robustify(row, total, **settings)[0] for row, total in pairs])
    found = divide_heads(torch.from_numpy(demand).to(DEVICE), torch.from_numpy(totals).to(DEVICE), **settings)
    return found.cpu().numpy(), expected


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    n_heads=st.integers(1, 16),
    n_rows=st.integers(1, 5),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    floor=st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    cap=st.sampled_from([1.0, 1.3, 2.0, 8.0]),
    protected=st.sampled_from([0, 1, 9]),
)
def test_rows_are_divided_as_one_layer_is(data, n_heads, n_rows, exponent, floor, cap, protected):
    counts = st.lists(st.integers(0, 300), min_size=n_heads, max_size=n_heads)
    demand = np.array(data.draw(st.lists(counts, min_size=n_rows, max_size=n_rows)), np.int32)
    least = n_heads * max(1, protected)
    totals = np.array(
        data.draw(st.lists(st.integers(least, least + 3000), min_size=n_rows, max_size=n_rows)), np.int64
    )
    found, expected = _both(demand, totals, exponent=exponent, floor=floor, cap=cap, protected=protected)
    np.testing.assert_array_equal(found.sum(1), totals)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("demand", [[0, 0, 0, 0], [1, 0, 0, 0], [5, 5, 5, 5]])
def test_heads_without_demand_and_equal_ones(demand):
    found, expected = _both(
        np.array([demand], np.int32), np.array([402]), exponent=0.5, floor=0.25, cap=2.0, protected=8
    )
    np.testing.assert_array_equal(found, expected)


def test_remainders_that_are_equal_in_truth_are_ties():
    # 70.5 and 126.5 entries in two of the heads, but for the rounding errors of their making.
    demand = np.array([[0, 88, 106, 158, 185, 187, 187, 123, 187, 271]], np.int32)
    found, expected = _both(demand, np.array([1153]), exponent=1.0, floor=0.25, cap=1.3, protected=0)
    np.testing.assert_array_equal(found, expected)
    assert found[0].tolist() == [29, 71, 85, 126, 148, 149, 149, 98, 149, 149]
