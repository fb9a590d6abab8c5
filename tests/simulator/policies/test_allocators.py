"""Budgets of the published allocators: exact, bounded, as their papers say, or refused in words."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import naive_allocators
import naive_rules
import numpy as np
import pytest
from agreement import agree, make_wave
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.apportion import divide, fractions
from simulator.policies.heads.adakv import AdaKV, wins
from simulator.policies.heads.custom import CustomHeads
from simulator.policies.heads.duo import Duo
from simulator.policies.heads.headkv import HeadKV
from simulator.policies.heads.uniform import UniformHeads
from simulator.policies.heads.utility import UtilityHeads
from simulator.policies.language import parse_policy
from simulator.policies.layers.cake import Cake, spread_and_shift
from simulator.policies.layers.custom import CustomLayers
from simulator.policies.layers.pyramid import PyramidCode
from simulator.policies.layers.squeeze import Squeeze, low_cluster
from simulator.policies.layers.table import TableLayers
from simulator.policies.layers.wave import WaveLayers
from simulator.policies.layers.wave_dynamic import WaveDynamic
from simulator.policies.parts import HeadRequest, LayerRequest, PolicyError
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS
from simulator.policies.view import CacheView
from simulator.policies.wave import Wave
from traces.errors import InfeasibleBudgetError, MissingDataError, UserError

# Zeros, ties and extreme skew.
demands = st.lists(
    st.one_of(st.just(0.0), st.integers(0, 9).map(float), st.floats(0, 1e6), st.sampled_from([1e-12, 1e300])),
    min_size=1,
    max_size=10,
)
protected_and_free = st.tuples(st.integers(0, 20), st.integers(0, 200))


def layer_request(entries, protected, demand=(1.0,), n_kv_heads=1, head_demand=None, n_layers=None):
    rows = head_demand or [(value,) * n_kv_heads for value in demand]
    wave = Wave("m", "", 0.93, tuple(demand), tuple(map(tuple, rows)), (), 1)
    n_layers = n_layers or len(demand)
    return LayerRequest(n_layers, entries, protected, "m", "", "t", {"m": wave}, n_kv_heads)


def written(path, found):
    path.write_text(json.dumps(found))
    return str(path)


# ---- what holds for all -----------------------------------------------------------------------------------

LAYERS = [WaveLayers(), Squeeze(), Squeeze(squeeze_share=0.0), TableLayers(), TableLayers(head_beta=2.0)]


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


HEADS = [HeadKV(), HeadKV(head_beta=3.0), Duo(), Duo(streaming_share=0.8, stream_budget=0.0), CustomHeads()]


@pytest.mark.parametrize("allocator", HEADS, ids=repr)
@given(demands, protected_and_free, st.integers(0, 9))
@MODERATE
def test_static_heads_meet_the_total_and_follow_the_table(allocator, row, sizes, remainder):
    protected, free = sizes
    n = len(row)
    total = n * (protected + free) + min(remainder, n - 1)
    if allocator.name == "custom":
        row = [value + 1e-3 for value in row]
        table = np.array(row)
    else:
        table = allocator.table(layer_request(9, 1, [1.0], n, [row]))[0]
    scores = [np.zeros(5, np.float32)] * n
    budgets, _ = allocator.allocate(HeadRequest(scores, total, protected, 0, table))
    assert budgets.dtype == np.int64
    assert budgets.sum() == total
    assert budgets.min() >= protected
    for i in range(n):
        for j in range(n):
            if row[i] > row[j]:
                assert budgets[i] >= budgets[j] - 1
    again, _ = allocator.allocate(HeadRequest(scores, total, protected, 0, table))
    np.testing.assert_array_equal(budgets, again)


@st.composite
def contests(draw):
    """Draw scores of a few heads, many of them tied, the protected infinite; and a total they can hold."""
    protected = draw(st.integers(0, 4))
    values = st.sampled_from([0.0, 0.5, 1.0, 1e-30, 3e38]) | st.floats(-5, 5, width=32)
    scores = [
        np.array([*draw(st.lists(values, max_size=30)), *[np.inf] * protected], np.float32)
        for _ in range(draw(st.integers(1, 5)))
    ]
    total = draw(st.integers(len(scores) * protected, len(scores) * (protected + 25)))
    return scores, total, protected


@given(contests(), st.sampled_from(["blend", "floor"]), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@MODERATE
def test_adakv_is_the_twin_and_keeps_its_bounds(contest, form, uniform_share):
    scores, total, protected = contest
    allocator, n = AdaKV(form=form, uniform_share=uniform_share), len(scores)
    budgets, binding = allocator.allocate(HeadRequest(scores, total, protected))
    assert budgets.sum() == total
    assert not binding
    evictable = total - n * protected
    least = uniform_share * evictable / n
    for budget, own in zip(budgets.tolist(), scores, strict=True):
        if form == "blend":
            assert budget - protected >= math.floor(least + 1e-6) - (uniform_share == 1.0)
        else:
            assert budget - protected >= min(math.floor(least), len(own) - protected)
    rules = naive_rules.Rules(heads="adakv", form=form, uniform_share=uniform_share)
    safe, pooled, n_places = naive_allocators.competitors(rules, [own.tolist() for own in scores], evictable)
    winners, _ = naive_allocators.winners_of(pooled, n_places)
    shares = naive_allocators.adakv_shares(rules, safe, winners, evictable)
    rounded = naive_rules.round_to_total([round(share, 6) for share in shares], evictable)
    assert np.abs(budgets - protected - rounded).max() <= (len(set(shares)) > 1)


def test_adakv_by_hand():
    scores = [
        np.array(own, np.float32) for own in ([9, 8, 7, 6, 5, 4], [3, 2, 1, 0.5, 0, 0], [4, 0, 0, 0, 0, 0])
    ]
    free = AdaKV(uniform_share=0.0).allocate(HeadRequest(scores, 9, 0))[0]
    # The best nine: all six of the first head, one of the last, two of the second.
    assert free.tolist() == [6, 2, 1]
    # Shares 6, 2 and 1 are blended by half with three each.
    assert AdaKV(uniform_share=0.5).allocate(HeadRequest(scores, 9, 0))[0].tolist() == [5, 2, 2]
    # Two of each head are safe, and the best three others are the first head's.
    guarded = AdaKV(form="floor", uniform_share=0.7).allocate(HeadRequest(scores, 9, 0))[0]
    assert guarded.tolist() == [5, 2, 2]
    assert AdaKV(uniform_share=1.0).allocate(HeadRequest(scores, 10, 0))[0].tolist() == [4, 3, 3]


def test_adakv_shares_ties_at_the_last_place_alike():
    tied = [np.zeros(8, np.float32), np.zeros(8, np.float32), np.zeros(4, np.float32)]
    assert wins(tied, 10).tolist() == [4, 4, 2]
    assert wins(tied, 0).tolist() == [0, 0, 0]
    assert wins(tied, 26).tolist() == [10, 10, 6]
    assert AdaKV(uniform_share=0.0).allocate(HeadRequest(tied, 10, 0))[0].tolist() == [4, 4, 2]


def test_adakv_compares_heads_beyond_the_protected():
    inf = np.inf
    scores = [np.array(own, np.float32) for own in ([inf, inf, 5, 4, 3], [inf, inf, 2, 1, 0])]
    assert AdaKV(uniform_share=0.0).allocate(HeadRequest(scores, 7, 2))[0].tolist() == [5, 2]


@given(demands)
@MODERATE
def test_fractions_sum_to_one(weights):
    found = fractions(np.array(weights))
    assert abs(found.sum() - 1) < 1e-9
    assert (found >= 0).all()


def test_shares_equal_but_for_rounding_errors_are_ties():
    # 10.4 - 10 exceeds 3.4 - 3 in floats.
    assert divide(np.array([3.4, 10.4, 6.2]), 20).tolist() == [4, 10, 6]


# ---- one by one -------------------------------------------------------------------------------------------


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


def test_custom_heads_are_listed_or_in_a_file(tmp_path):
    request = layer_request(20, 2, n_layers=2, n_kv_heads=2)
    listed = CustomHeads(head_shares="3/1")
    assert listed.table(request).tolist() == [[3, 1], [3, 1]]
    path = written(tmp_path / "shares.json", [[3, 1], [1, 1]])
    table = CustomHeads(head_shares=path).table(request)
    assert table.tolist() == [[3, 1], [1, 1]]
    scores = [np.zeros(30, np.float32)] * 2
    assert listed.allocate(HeadRequest(scores, 40, 2, 0, table[0]))[0].tolist() == [30, 10]


def test_headkv_by_hand():
    # 30 evictable entries per head; at a beta of 1.5 ten are sure and twenty of each go to the pool.
    row, scores = np.array([4.0, 0, 0, 0]), [np.zeros(9, np.float32)] * 4
    budgets, _ = HeadKV(head_beta=1.5).allocate(HeadRequest(scores, 128, 2, 0, row))
    assert budgets.tolist() == [92, 12, 12, 12]
    # As published: of 512 entries 506 go to the pool, give or take a rounding.
    budgets, _ = HeadKV().allocate(HeadRequest(scores, 4 * 512, 0, 0, row))
    assert budgets.min() in (5, 6)


def test_published_head_tables_are_read(tmp_path):
    # Four query heads of two groups; scores of several samples are averaged, groups summed.
    scores = {f"{layer}-{head}": [layer + head, layer + head + 2] for layer in range(2) for head in range(4)}
    path = written(tmp_path / "heads.json", scores)
    table = HeadKV(head_table=path).table(layer_request(20, 2, n_layers=2, n_kv_heads=2))
    assert table.tolist() == [[1 + 2, 3 + 4], [2 + 3, 4 + 5]]
    layers, _ = TableLayers(head_table=path, head_beta=1.0).allocate(
        layer_request(24, 4, n_layers=2, n_kv_heads=2)
    )
    assert layers.tolist() == [4 + 17, 4 + 23]  # 40 entries by 10 to 14


def test_head_tables_default_to_the_wave():
    request = layer_request(20, 2, [2.0, 6.0], 2, [[1, 3], [5, 7]])
    assert HeadKV().table(request).tolist() == [[1, 3], [5, 7]]
    assert Duo().table(request).tolist() == [[0, 0], [1, 1]]
    assert Duo(streaming_share=0.25).table(request).tolist() == [[0, 1], [1, 1]]


def test_of_equal_heads_the_later_are_streaming():
    request = layer_request(20, 2, [1.0, 1.0], 2)
    assert Duo(streaming_share=0.25).table(request).tolist() == [[1, 1], [1, 0]]
    assert Duo(streaming_share=1.0).table(request).tolist() == [[0, 0], [0, 0]]


def test_duo_by_hand():
    scores = [np.zeros(9, np.float32)] * 4

    def budgets(table, protected):
        return Duo().allocate(HeadRequest(scores, 160, protected, 0, np.array(table)))

    assert budgets([1.0, 0, 1, 0], 2)[0].tolist() == [70, 10, 70, 10]
    found, binding = budgets([1.0, 0, 1, 0], 12)
    assert (found.tolist(), binding) == ([68, 12, 68, 12], True)
    for alike in ([1.0] * 4, [0.0] * 4):
        assert budgets(alike, 2)[0].tolist() == [40] * 4


@pytest.mark.parametrize(
    ("found", "error", "named"),
    [
        ([[1, 2], [3, 4], [5, 6]], MissingDataError, "3 layers of 2 KV heads; allowed: 2 layers of 2"),
        ([[1, 2], [3]], MissingDataError, "2 layers of 1 or 2 KV heads"),
        ([], MissingDataError, "0 layers of no KV heads"),
        ([[1, -2], [3, 4]], UserError, "negative"),
        ([[1, float("nan")], [3, 4]], MissingDataError, "nan found; allowed: finite"),
        ([[1, 10**400], [3, 4]], MissingDataError, "401 digits found; allowed: 64 bits"),
        ([[1, "2"], [3, 4]], UserError, "something else than numbers"),
        ([[1, True], [3, 4]], UserError, "something else than numbers"),
        ([1, 2], UserError, "something else than numbers"),
        (7, UserError, "something else than numbers"),
        ({"0-0": [1], "0-1": [1], "1-0": [1]}, MissingDataError, "3 entries; allowed: one 'layer-head'"),
        ({"0-0": [1], "0-1": [1], "1-0": [1], "2-1": [1]}, MissingDataError, "4 entries"),
        ({"0-0": [1], "1-0": [1]}, MissingDataError, "2 KV heads"),
        ({f"{i}-{j}": [] for i in (0, 1) for j in (0, 1)}, UserError, "no score for head 0-0"),
        ({f"{i}-{j}": 1 for i in (0, 1) for j in (0, 1)}, UserError, "something else than numbers"),
    ],
)
@pytest.mark.parametrize("allocator", [HeadKV, Duo, TableLayers])
def test_bad_head_tables_are_refused(allocator, found, error, named, tmp_path):
    request = layer_request(20, 2, n_layers=2, n_kv_heads=2)
    allocator = allocator(head_table=written(tmp_path / "heads.json", found))
    ask = allocator.allocate if allocator.name == "table" else allocator.table
    with pytest.raises(error, match=named) as refusal:
        ask(request)
    assert type(refusal.value) is error
    assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        ("1/2/3", MissingDataError, "2 layers of 3 KV heads; allowed: 2 layers of 2"),
        ("", UserError, "no head_shares; allowed: head_shares=2/1/1/1"),
        ("no/such.json", MissingDataError, "No such file"),
        ([[1, 2], [1, 0]], UserError, "holds 0; allowed"),
        ([1, 2], UserError, "something else than numbers"),
    ],
)
def test_bad_head_shares_are_refused(text, error, named, tmp_path):
    if not isinstance(text, str):
        text = written(tmp_path / "shares.json", text)
    with pytest.raises(error, match=named) as refusal:
        CustomHeads(head_shares=text).table(layer_request(20, 2, n_layers=2, n_kv_heads=2))
    assert type(refusal.value) is error


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "table.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not valid JSON|not UTF-8|levels of nesting"):
            HeadKV(head_table=str(path)).table(layer_request(20, 2))


@pytest.mark.parametrize("allocator", [Squeeze(), TableLayers(), HeadKV(), Duo()], ids=repr)
def test_waves_are_checked_by_all_that_use_them(allocator):
    ask = allocator.allocate if allocator.name in LAYER_ALLOCATORS else allocator.table
    request = layer_request(20, 2, [1.0, 2], 2)
    ask(request)
    with pytest.raises(MissingDataError, match=r"no wave for model 'other' \(known: m\)"):
        ask(replace(request, model="other"))
    with pytest.raises(MissingDataError, match="has 2 layers, the trace 3"):
        ask(replace(request, n_layers=3))
    wave = replace(request.waves["m"], model_revision="r1", trace_ids=("t",))
    with pytest.raises(MissingDataError, match="of revision r1, the trace of r2; allowed: the same"):
        ask(replace(request, waves={"m": wave}, model_revision="r2"))
    with pytest.raises(UserError, match="trace t was used to calibrate"):
        ask(replace(request, waves={"m": wave}))


def test_infeasible_budgets_are_refused(make_trace):
    trace = make_trace()
    waves = {trace.model: make_wave(trace, (1, 5))}
    # Without protected entries a floored pyramid of ten ends in a layer without any.
    with pytest.raises(InfeasibleBudgetError, match="'pyramid-code' leaves layer 1 no entry"):
        Request(trace, parse_policy("knorm+pyramid-code"), 10)
    with pytest.raises(InfeasibleBudgetError, match="at least 9"):
        Request(trace, parse_policy("snapkv+squeeze+duo"), 8, waves=waves)


# ---- measured ones ----------------------------------------------------------------------------------------


def view_of(weights):
    """Make a view whose attention is given: (n_queries, n_entries), rows summing to 1, no group."""
    weights = np.asarray(weights, np.float32)
    n_queries, n_entries = weights.shape
    return CacheView(
        keys=np.eye(n_entries, dtype=np.float32),
        positions=np.arange(n_entries, dtype=np.int32),
        queries=np.log(weights)[None],
        scale=1.0,
        n_tokens=n_entries + n_queries,
        prompt_tokens=n_entries,
        layer=0,
        kv_head=0,
        seed=0,
    )


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


DYNAMIC = [
    ("snapkv+wave-dynamic:buffer=4,layer_delta=12,gamma=2", True),
    ("rkv+wave-dynamic+utility:buffer=4,layer_delta=7,delta=8", True),
    ("streamingllm+wave-dynamic+adakv:trigger=per-step,layer_delta=10", True),
    ("snapkv+wave-dynamic:buffer=4,layer_delta=0,gamma=2", False),
    ("snapkv+cake:buffer=4,cake_window=8", False),
]


@pytest.fixture
def uneven_trace(make_trace, rng):
    """Write a trace whose layers differ in how they attend, and change while it decodes."""
    queries, keys = rng.normal(size=(3, 4, 150, 8)), rng.normal(size=(3, 2, 150, 8))
    sharpness = np.ones((3, 1, 150, 1))
    sharpness[0, :, :80] = sharpness[1, :, 80:] = 6
    return make_trace(arrays=(queries * sharpness, keys), prompt_tokens=40)


@pytest.mark.parametrize(("policy", "moves"), DYNAMIC)
def test_dynamic_layer_budgets_move_and_their_total_stays(policy, moves, uneven_trace):
    entries, buffer, n_kv_heads = 17, 4, 2
    request = Request(uneven_trace, parse_policy(policy), entries)
    (outcome,) = Engine([request]).run()
    total = 3 * n_kv_heads * entries
    assert sum(layer.compressor.total for layer in request.layers) == total
    in_force = [
        {division.budgets.sum() for division in outcome.divisions if division.layer == layer}
        for layer in range(3)
    ]
    assert len({max(budgets) for budgets in in_force}) > 1, "layers are divided alike"
    assert any(len(budgets) > 1 for budgets in in_force) == moves
    assert all(division.lengths.sum() <= division.budgets.sum() for division in outcome.divisions)
    # After a reallocation a layer that lost budget holds it for one more token.
    assert outcome.held[1:].max() <= total + 3 * n_kv_heads * (buffer + 1)


@pytest.mark.parametrize(("policy", "moves"), DYNAMIC)
def test_dynamic_runs_are_equal_bit_for_bit(policy, moves, uneven_trace):
    outcomes = [
        Engine([Request(uneven_trace, parse_policy(policy), 17) for _ in range(2)], jobs=jobs).run()
        for jobs in (1, 1, 2)
    ]
    first, *others = [outcome for run in outcomes for outcome in run]
    for other in others:
        np.testing.assert_array_equal(first.mass, other.mass)
        np.testing.assert_array_equal(first.held, other.held)
        np.testing.assert_array_equal(first.evicted_at, other.evicted_at)
        for one, same in zip(first.divisions, other.divisions, strict=True):
            assert (one.layer, one.compression, one.n_tokens) == (same.layer, same.compression, same.n_tokens)
            np.testing.assert_array_equal(one.budgets, same.budgets)


def test_a_static_division_is_carried_out_once_and_after_a_layer_reallocation(uneven_trace):
    still = agree(uneven_trace, "recency+custom+custom:buffer=4,layer_shares=1/2/3,head_shares=3/1", 17)
    for layer, total in enumerate((18, 34, 50)):
        found = {tuple(d.budgets.tolist()) for d in still.outcome.divisions if d.layer == layer}
        assert found == {tuple(naive_allocators.in_proportion([3, 1], total, 0))}
    moving = agree(uneven_trace, "snapkv+wave-dynamic+custom:buffer=4,layer_delta=30,head_shares=3/2", 17)
    budgets = {(d.layer, tuple(d.budgets.tolist())) for d in moving.outcome.divisions}
    assert len(budgets) > 3
    assert all(a > b for _, (a, b) in budgets)


@pytest.mark.parametrize("text", ["recency+table+headkv", "tova+uniform+duo", "snapkv+wave-dynamic+headkv"])
@pytest.mark.parametrize("official", [False, True])
def test_tables_from_files_are_the_twins(text, official, uneven_trace, tmp_path):
    found = [[5, 1], [1, 0], [2, 9]]
    if official:
        heads = [(layer, head) for layer in range(3) for head in range(4)]
        found = {f"{layer}-{head}": [head % 3, layer, 1.5] for layer, head in heads}
    path = written(tmp_path / "table.json", found)
    assert not agree(uneven_trace, f"{text}:buffer=6,head_table={path}", 19).adopted


def test_every_allocator_is_sound_by_default():
    for table in (LAYER_ALLOCATORS, HEAD_ALLOCATORS):
        for name, part in table.items():
            assert part().name == name
            assert part.__doc__


# ---- the prompt kept --------------------------------------------------------------------------------------

KEEPING = [
    "snapkv:buffer=4",
    "rkv+wave+utility:buffer=4,delta=8,slot_order=score",
    "random+pyramid+adakv:buffer=4",
    "knorm+wave-dynamic+adakv:buffer=4,layer_delta=9,form=floor",
    "streamingllm+squeeze+duo:trigger=per-step",
    "recency+cake+custom:trigger=every-n,interval=5,head_shares=1/9",
]


@pytest.mark.parametrize("policy", KEEPING)
def test_a_kept_prompt_is_never_evicted(policy, make_trace):
    trace = make_trace(n_layers=3, n_tokens=90, prompt_tokens=20)
    agreement = agree(trace, f"{policy},prompt=keep", 34, demand=(2, 40, 7), seed=3)
    assert not agreement.adopted
    assert agreement.outcome.n_evicted > 0
    assert (agreement.outcome.evicted_at[:, :, :20] > trace.total_tokens).all()
    assert all(division.budgets.min() >= 20 for division in agreement.outcome.divisions)


def test_a_budget_has_to_hold_the_kept_prompt(make_trace):
    trace = make_trace(prompt_tokens=20)
    policy = parse_policy("snapkv:window=5,prompt=keep")
    Request(trace, policy, 26)
    with pytest.raises(InfeasibleBudgetError, match=r"a prompt of 20 and 5 recent .* at least 26") as refusal:
        Request(trace, policy, 25)
    assert refusal.value.exit_code == 5


def test_utility_heads_are_unchanged():
    # Parameters are part of what a stored result is known by.
    assert [item.name for item in fields(UtilityHeads)] == ["delta", "beta", "mu", "head_cap", "pooling"]


@pytest.mark.parametrize("text", ["fullkv+cake", "rkv+cake:trigger=never", "rkv+wave-dynamic:trigger=never"])
def test_what_never_evicts_needs_no_division(text, make_trace):
    (outcome,) = Engine([Request(make_trace(), parse_policy(text), 10)]).run()
    assert (outcome.mass == 1).all()


def test_cake_leaves_every_layer_an_entry(make_trace, rng):
    keys = rng.normal(size=(2, 2, 60, 8))
    keys[1] = 0  # attends alike to everything, at all times
    trace = make_trace(arrays=(rng.normal(size=(2, 4, 60, 8)), keys))
    (outcome,) = Engine([Request(trace, parse_policy("tova+cake:tau2=0.1,buffer=4"), 10)]).run()
    assert {int(division.budgets.min()) for division in outcome.divisions if division.layer == 1} == {1}


def test_results_tell_the_content_of_a_file_of_shares(tmp_path):
    file = tmp_path / "shares.json"
    texts = [f"rkv+custom:layer_shares={file}", f"rkv+headkv:head_table={file}"]
    for text in texts:
        file.write_text("[1, 2]")
        first = parse_policy(text).parameters["source"]
        file.write_text("[1, 3]")
        assert first.startswith("shares.json ")
        assert parse_policy(text).parameters["source"] != first
    assert "source" not in parse_policy("rkv+custom:layer_shares=1/2").parameters
    assert "source" not in parse_policy("rkv+headkv").parameters


def test_one_number_is_a_list_of_one():
    assert parse_policy("rkv+custom:layer_shares=4").layers.layer_shares == "4"
    assert parse_policy("rkv:trigger=segment,segment=198").trigger.segment == "198"


def test_a_table_of_another_shape_is_refused(make_trace):
    class Wide(UniformHeads):
        def table(self, request):
            return np.ones((request.n_layers, request.n_kv_heads + 1))

    policy = replace(parse_policy("rkv"), heads=Wide())
    with pytest.raises(PolicyError, match=r"'uniform' has a table of shape \(2, 3\); allowed: \(2, 2\)"):
        Request(make_trace(), policy, 20)
