"""Budgets of layers: exact, bounded, as their papers say, or refused in words."""

from __future__ import annotations

import math
from dataclasses import replace

import naive_allocators
import naive_rules
import numpy as np
import pytest
from allocating import demands, layer_request, protected_and_free, view_of, written
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from simulator.policies.layers.cake import Cake, spread_and_shift
from simulator.policies.layers.custom import CustomLayers
from simulator.policies.layers.pyramid import PyramidCode
from simulator.policies.layers.squeeze import Squeeze, low_cluster
from simulator.policies.layers.table import TableLayers
from simulator.policies.layers.wave import WaveLayers
from simulator.policies.layers.wave_dynamic import WaveDynamic
from traces.errors import MissingDataError, UserError

LAYERS = [WaveLayers(), Squeeze(), Squeeze(squeeze_share=0.0), TableLayers(), TableLayers(head_beta=2.0)]


@pytest.mark.slow
@pytest.mark.parametrize("allocator", LAYERS, ids=repr)
@given(demands, protected_and_free)
@MODERATE
def test_layers_meet_the_total_and_follow_the_demand(allocator, demand, sizes):
    protected, free = sizes
    entries = protected + free + 1
    budgets, _ = allocator.allocate(layer_request(entries, protected, demand))
    assert budgets.dtype == np.int64
    assert budgets.sum() == len(demand) * entries
    assert budgets.min() >= protected
    for i in range(len(demand)):
        for j in range(len(demand)):
            if demand[i] > demand[j]:
                # What is next to nothing counts as nothing, and layers of one class as equal.
                is_alike = demand[i] - demand[j] <= 1e-6 * max(demand) or allocator.name == "squeeze"
                assert budgets[i] >= budgets[j] - is_alike
            if demand[i] == demand[j]:
                assert 0 <= budgets[min(i, j)] - budgets[max(i, j)] <= 1
    if len(set(demand)) == 1:
        assert (budgets == entries).all()


@pytest.mark.parametrize(
    ("entries", "n_layers", "percent"),
    [(64, 32, 13.4), (128, 28, 5.0), (128, 32, 4.6), (128, 36, 7.5), (512, 28, 1.3), (512, 32, 2.8)],
)
def test_pyramid_code_overshoots_as_published(entries, n_layers, percent):
    budgets, _ = PyramidCode().allocate(layer_request(entries, 8, n_layers=n_layers))
    evictable = (budgets - 8).sum() / (n_layers * (entries - 8))
    assert round(100 * (evictable - 1), 1) == percent
    assert len(set(np.diff(budgets))) == 1
    assert not PyramidCode.exact


def test_pyramid_code_by_hand():
    budgets, _ = PyramidCode().allocate(layer_request(128, 8, n_layers=32))
    assert (budgets[[0, -1]] - 8).tolist() == [234, 17]
    assert PyramidCode().allocate(layer_request(128, 8, n_layers=1))[0].tolist() == [128]


def test_squeeze_by_hand():
    # 3, 4 and 5 are far below 50 and 60: they get two fifths of 20, the others what that frees.
    budgets, binding = Squeeze().allocate(layer_request(20, 2, [3.0, 60, 4, 50, 5]))
    assert budgets.tolist() == [8, 38, 8, 38, 8]
    assert not binding
    budgets, binding = Squeeze().allocate(layer_request(20, 12, [3.0, 60, 4, 50, 5]))
    assert budgets.tolist() == [12, 32, 12, 32, 12]
    assert binding


@given(st.lists(st.integers(0, 40).map(float), min_size=1, max_size=9))
@MODERATE
def test_squeeze_finds_the_best_of_all_splits(demand):
    found = low_cluster(np.array(demand))
    assert set(np.flatnonzero(found).tolist()) == naive_allocators.lower_cluster(demand)
    assert found.any() == (len(set(demand)) > 1)


def test_custom_shares_are_parts_of_the_total(tmp_path):
    request = layer_request(96, 8, n_layers=2)
    for text in ("128/64", "2/1", "0.5/0.25", written(tmp_path / "shares.json", [128, 64])):
        assert CustomLayers(layer_shares=text).allocate(request)[0].tolist() == [128, 64]
    # A layer whose part is too small for its protected entries gets those.
    budgets, binding = CustomLayers(layer_shares="100/1/1").allocate(layer_request(20, 8, n_layers=3))
    assert budgets.tolist() == [44, 8, 8]
    assert binding


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        ("1/2/3", MissingDataError, "3 numbers; allowed: one for each of the 2 layers of model 'm'"),
        ("", UserError, "no layer_shares; allowed: layer_shares=4/2/1"),
        ("no/such.json", MissingDataError, "no/such.json: cannot be read: No such file"),
        ("4/two", MissingDataError, "4/two: cannot be read: No such file"),
        ([1, 2, 3], MissingDataError, "3 numbers"),
        ([1, 0], UserError, "holds 0; allowed: finite numbers above 0"),
        ([1, float("inf")], MissingDataError, "inf found; allowed: finite"),
        ({"a": 1}, UserError, "something else than numbers"),
    ],
)
def test_bad_layer_shares_are_refused(text, error, named, tmp_path):
    if not isinstance(text, str):
        text = written(tmp_path / "shares.json", text)
    with pytest.raises(error, match=named) as refusal:
        CustomLayers(layer_shares=text).allocate(layer_request(20, 2, n_layers=2))
    assert type(refusal.value) is error


def test_cake_measures_spread_and_shift():
    spread, shift = spread_and_shift(view_of([[0.5, 0.5], [0.25, 0.75]]))
    mean = [0.375, 0.625]
    assert spread == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-6)
    assert shift == pytest.approx(2 * 0.125**2, rel=1e-6)
    # A single query shifts nowhere, a single entry spreads nowhere.
    assert spread_and_shift(view_of([[0.5, 0.5]]))[1] == 0
    assert spread_and_shift(view_of([[1.0], [1.0]])) == (0, 0)


def test_cake_follows_the_preference():
    calm, lively = [[0.5, 0.5], [0.5, 0.5]], [[0.4, 0.6], [0.6, 0.4]]
    livelier = [[0.3, 0.7], [0.7, 0.3]]
    request = layer_request(20, 5, n_layers=3)
    views = [[view_of(calm)], [view_of(lively)], [view_of(livelier)]]
    # Their means spread alike; the variances are as 0, 1 and 4.
    assert Cake().allocate(replace(request, views=views))[0].tolist() == [5, 14, 41]
    # At a temperature of 2 the shift counts by its root.
    assert Cake(tau2=2.0).allocate(replace(request, views=views))[0].tolist() == [5, 20, 35]
    assert Cake().allocate(replace(request, views=[[view_of(calm)]] * 3))[0].tolist() == [20, 20, 20]


def test_wave_dynamic_counts_what_holds_the_mass():
    narrow, wide = [[0.97, 0.01, 0.01, 0.01]], [[0.25, 0.25, 0.25, 0.25]]
    views = [[view_of(narrow)] * 2, [view_of(wide)] * 2, [view_of(narrow), view_of(wide)]]
    # Demands 1, 4 and 2.5.
    request = replace(layer_request(20, 5, n_layers=3, n_kv_heads=2), views=views)
    expected = naive_rules.robustify([1, 4, 2.5], 60, 0.5, 0.25, 2.0, 5)
    assert WaveDynamic().allocate(request)[0].tolist() == expected
    assert WaveDynamic(gamma=1.0).allocate(request)[0].tolist() == [8, 32, 20]


def test_cake_leaves_every_layer_an_entry(make_trace, rng):
    keys = rng.normal(size=(2, 2, 60, 8))
    keys[1] = 0  # attends alike to everything, at all times
    trace = make_trace(arrays=(rng.normal(size=(2, 4, 60, 8)), keys))
    (outcome,) = Engine([Request(trace, parse_policy("tova+cake:tau2=0.1,buffer=4"), 10)]).run()
    assert {int(division.budgets.min()) for division in outcome.divisions if division.layer == 1} == {1}
