"""The compiled loop that measures a span of all heads, against products and sums in float64."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.kernels.spans import measure_heads
from simulator.kernels.tiles import WIDTH, form_of, n_panels
from simulator.kernels.widening import KINDS, widen_rows
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from simulator.policies.view import CacheView, LayerView
from traces.numbers import STORAGE_DTYPES, round_to_storage, to_float32

SCALE = np.float32(0.3)


def _address(array):
    return array.__array_interface__["data"][0]


def _measured(keys, own, stored, dtype, lse, products=None):
    """Measure heads whose queries are stored as (n_kv_heads, group_size, n_tokens, head_dim)."""
    form = form_of(dtype, stored.shape[3])
    if form.paired:
        keys = [round_to_storage(held, dtype) for held in keys]
    room = np.full(n_panels(lse[0].size) * WIDTH * form.depth, np.nan, np.float32)
    mass = np.full(lse.shape, np.nan, np.float32)
    measure_heads(
        np.array([_address(held) for held in keys]),
        own,
        _address(stored),
        np.array(stored.strides[:3]),
        form,
        lse,
        SCALE,
        room,
        np.empty((0, 0, 0), np.float32) if products is None else products,
        mass,
    )
    return mass


def _expected(keys, own, queries, lse):
    mass = np.zeros(lse.shape)
    for kv_head, member, token in np.ndindex(lse.shape):
        seen = keys[kv_head][: own[kv_head, token] + 1].astype(np.float64)
        logits = SCALE * (seen @ queries[kv_head, member, token].astype(np.float64))
        mass[kv_head, member, token] = np.exp(logits - lse[kv_head, member, token]).sum()
    return mass


def _drawn(rng, shape, dtype):
    """Draw float32 numbers that can be stored exactly."""
    return to_float32(round_to_storage(rng.normal(size=shape).astype(np.float32), dtype), dtype)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("group_size", [1, 3, 4, 7])
def test_mass_of_a_span(rng, dtype, group_size):
    n_tokens, head_dim = 9, 24
    keys = [_drawn(rng, (n, head_dim), dtype) for n in (9, 40, 1013)]
    # Every token, or some of those appended.
    own = np.array([np.arange(len(held) - n_tokens, len(held)) for held in keys])
    whole = round_to_storage(rng.normal(size=(3, group_size, 30, head_dim)).astype(np.float32), dtype)
    stored = whole[:, :, 5 : 5 + n_tokens]
    assert not stored.flags.c_contiguous
    lse = rng.normal(size=(3, group_size, n_tokens)).astype(np.float32)
    for picked in (np.arange(n_tokens), np.array([0, 1, 5, 8]), np.array([7])):
        some = stored[:, :, picked] if len(picked) < n_tokens else stored
        found = _measured(keys, own[:, picked], some, dtype, np.ascontiguousarray(lse[:, :, picked]))
        expected = _expected(keys, own[:, picked], to_float32(some, dtype), lse[:, :, picked])
        np.testing.assert_allclose(found, expected, rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_kept", [1, 2, 9])
@pytest.mark.parametrize("group_size", [1, 3, 4, 7])
def test_products_of_the_last_queries_are_kept(rng, group_size, n_kept, dtype):
    n_tokens, head_dim = 9, 24
    keys = [_drawn(rng, (n, head_dim), dtype) for n in (9, 613)]
    own = np.array([np.arange(len(held) - n_tokens, len(held)) for held in keys])
    queries = _drawn(rng, (2, group_size, n_tokens, head_dim), dtype)
    stored = round_to_storage(queries, dtype)
    lse = np.zeros((2, group_size, n_tokens), np.float32)
    products = np.full((2, 700, n_kept * group_size), np.nan, np.float32)
    with_products = _measured(keys, own, stored, dtype, lse, products)
    np.testing.assert_array_equal(with_products, _measured(keys, own, stored, dtype, lse))
    for kv_head, held in enumerate(keys):
        n_candidates = len(held) - n_kept
        last = queries[kv_head, :, -n_kept:].transpose(1, 0, 2).reshape(-1, head_dim)
        expected = held[:n_candidates].astype(np.float64) @ last.T.astype(np.float64)
        np.testing.assert_allclose(products[kv_head, :n_candidates], expected, atol=2e-5)
        assert np.isnan(products[kv_head, len(held) :]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_stored_number_is_widened_exactly(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    bits = np.concatenate([bits[::2], bits[1::2]])
    numbers = np.empty(len(bits), np.float32)
    # Half of them in rows that vectors fill, half in rows that they do not.
    for first, width in ((0, 32), (2**15, 8)):
        n_rows = 2**15 // width
        widen_rows(_address(bits) + 2 * first, 2 * width, KINDS[dtype], n_rows, width, numbers, first, width)
    exact = to_float32(bits.view(STORAGE_DTYPES[dtype]), dtype)
    is_number = ~np.isnan(exact)
    np.testing.assert_array_equal(numbers[is_number].view(np.uint32), exact[is_number].view(np.uint32))
    assert np.isnan(numbers[~is_number]).all()


def test_what_is_not_a_number_is_seen(rng):
    stored = np.zeros((1, 1, 3, 16), np.float16)
    stored[0, 0, 1, 4], stored[0, 0, 2, 4] = np.nan, -np.inf
    keys = [np.ones((1, 16), np.float32)]
    lse, own = np.zeros((1, 1, 3), np.float32), np.zeros((1, 3), np.int64)
    plain, nan, lowest = _measured(keys, own, stored, "float16", lse)[0, 0]
    assert plain == 1
    assert np.isnan(nan)
    assert lowest < 1e-30


@pytest.mark.parametrize(
    "scorer", [SnapKV(window=4), RKV(window=4, kernel_size=3), SnapKV(window=4, kernel_size=1)]
)
def test_heads_are_judged_alike_together_and_one_by_one(rng, scorer):
    views = [
        CacheView(
            keys=rng.normal(size=(n, 16)).astype(np.float32),
            positions=np.arange(60 - n, 60, dtype=np.int32),
            queries=rng.normal(size=(3, 4, 16)).astype(np.float32) * 40,
            scale=0.25,
            n_tokens=60,
            prompt_tokens=5,
            layer=0,
            kv_head=kv_head,
            seed=0,
        )
        for kv_head, n in enumerate((4, 60, 5, 31))
    ]
    together = scorer.score_layer(LayerView.of(views))
    for view, found in zip(views, together, strict=True):
        np.testing.assert_array_equal(scorer.score(view), found)


def _view(rng, n):
    return CacheView(
        keys=rng.normal(size=(n, 16)).astype(np.float32),
        positions=np.arange(n, dtype=np.int32),
        queries=rng.normal(size=(2, 8, 16)).astype(np.float32),
        scale=0.25,
        n_tokens=n,
        prompt_tokens=5,
        layer=0,
        kv_head=0,
        seed=0,
    )


def test_a_subclass_that_scores_a_head_in_its_own_way_is_asked(rng):
    class Flat(RKV):
        def score(self, view):
            return np.full(view.n_entries, 7, np.float32)

    view = _view(rng, 9)
    assert (Flat().score_layer(LayerView.of([view]), Flat().new_memory())[0] == 7).all()


def test_a_subclass_may_change_the_score_that_it_inherits(rng):
    class Negative(RKV):
        def score(self, view):
            return -super().score(view)

    layer = LayerView.of([_view(rng, 9), _view(rng, 23)])
    for own, other in zip(Negative().score_layer(layer), RKV().score_layer(layer), strict=True):
        np.testing.assert_array_equal(own, -other)
