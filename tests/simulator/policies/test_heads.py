"""Budgets of KV heads from tables: exact, bounded, as their papers say, or refused in words."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from allocating import demands, layer_request, protected_and_free, written
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.request import Request
from simulator.policies.heads.custom import CustomHeads
from simulator.policies.heads.duo import Duo
from simulator.policies.heads.headkv import HeadKV
from simulator.policies.heads.uniform import UniformHeads
from simulator.policies.heads.utility import UtilityHeads
from simulator.policies.language import parse_policy
from simulator.policies.layers.table import TableLayers
from simulator.policies.parts import HeadRequest, PolicyError
from traces.errors import MissingDataError, UserError

HEADS = [HeadKV(), HeadKV(head_beta=3.0), Duo(), Duo(streaming_share=0.8, stream_budget=0.0), CustomHeads()]


@pytest.mark.slow
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


def test_utility_heads_are_unchanged():
    # Parameters are part of what a stored result is known by.
    assert [item.name for item in fields(UtilityHeads)] == ["delta", "beta", "mu", "head_cap", "pooling"]


def test_a_table_of_another_shape_is_refused(make_trace):
    class Wide(UniformHeads):
        def table(self, request):
            return np.ones((request.n_layers, request.n_kv_heads + 1))

    policy = replace(parse_policy("rkv"), heads=Wide())
    with pytest.raises(PolicyError, match=r"'uniform' has a table of shape \(2, 3\); allowed: \(2, 2\)"):
        Request(make_trace(), policy, 20)
