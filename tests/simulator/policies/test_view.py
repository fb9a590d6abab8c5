"""What a scorer is shown: a layer, any head of it by itself, and nothing that it could change."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from simulator.policies.parts import Scorer
from simulator.policies.view import CacheView, LayerView

LENGTHS = (3, 5)


@pytest.fixture
def layer(rng):
    return LayerView(
        keys=[rng.normal(size=(n, 4)).astype(np.float32) for n in LENGTHS],
        positions=[np.arange(n, dtype=np.int32) for n in LENGTHS],
        queries=rng.normal(size=(2, 3, 6, 4)).astype(np.float32),
        scale=0.5,
        n_tokens=9,
        prompt_tokens=4,
        layer=7,
        seed=11,
        values=[rng.normal(size=(n, 4)).astype(np.float32) for n in LENGTHS],
        state=[np.ones(n, np.float32) for n in LENGTHS],
        budget=[2, 6],
        since=5,
    )


def test_a_head_is_the_layers_own(layer):
    for kv_head, view in enumerate(layer.heads):
        assert (view.layer, view.kv_head, view.n_entries) == (7, kv_head, LENGTHS[kv_head])
        for name in ("scale", "n_tokens", "prompt_tokens", "seed", "since", "rope"):
            assert getattr(view, name) == getattr(layer, name)
        for name in ("keys", "positions", "queries", "values", "state"):
            assert np.shares_memory(getattr(view, name), getattr(layer, name)[kv_head])
        assert view.budget == layer.budget[kv_head]


def test_heads_put_together_are_the_layer(layer):
    again = LayerView.of(layer.heads)
    for item in fields(LayerView):
        mine, others = getattr(again, item.name), getattr(layer, item.name)
        if isinstance(others, list):
            for own, other in zip(mine, others, strict=True):
                np.testing.assert_array_equal(own, other)
        else:
            np.testing.assert_array_equal(mine, others)


def test_a_layer_is_read_only_and_its_source_is_not(layer):
    source = np.zeros((3, 4), np.float32)
    shown = replace(layer, keys=[source, source])
    for array in (*shown.keys, *shown.positions, shown.queries, *shown.values, *shown.state):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
    source[:] = 1


def test_products_are_of_one_view_alone(layer):
    products = [np.zeros((n, 18), np.float32) for n in LENGTHS]
    shown = layer.with_products(products)
    assert shown.products is products
    assert layer.products is None
    assert replace(shown, keys=layer.keys).products is None


def test_the_last_word_on_scoring_counts(layer):
    class Together(Scorer):
        name = "together"

        def score(self, view: CacheView):
            return np.zeros(view.n_entries)

        def score_layer(self, layer, memory=None):
            return [np.full(view.n_entries, 2.0) for view in layer.heads]

    class Apart(Together):
        def score(self, view):
            return np.full(view.n_entries, float(view.kv_head))

    class Again(Apart):
        def score_layer(self, layer, memory=None):
            return [own + 5 for own in super().score_layer(layer, memory)]

    for scorer, expected in ((Together(), [2, 2]), (Apart(), [0, 1]), (Again(), [5, 6])):
        assert [own[0] for own in scorer.score_layer(layer)] == expected
