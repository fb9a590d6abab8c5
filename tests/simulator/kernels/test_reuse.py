"""Scores are the same whether the window's products are taken from the span just measured or found anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

from simulator.engine import layer as layer_replay
from simulator.engine.compression import Compressor
from simulator.engine.layer import LayerReplay
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.policies.language import parse_policy
from simulator.policies.scorers.snapkv import SnapKV


class Compares(Compressor):
    """Scores twice wherever products are known."""

    n_known = n_unknown = 0

    def score(self, held, queries, n_tokens):
        found = super().score(held, queries, n_tokens)
        if held.products is None:
            Compares.n_unknown += 1
        else:
            Compares.n_known += 1
            anew = super().score(held._replace(products=None), queries, n_tokens)
            for own, other in zip(found, anew, strict=True):
                np.testing.assert_array_equal(own, other)
        return found


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.setattr(layer_replay, "Compressor", Compares)
    Compares.n_known = Compares.n_unknown = 0
    return Compares


def _replay(trace, policy, jobs=1, sampling=None, budget=20):
    sample = None if sampling is None else sampling.draw(trace, 0)
    Engine([Request(trace, parse_policy(policy), budget, sample=sample)], jobs).run()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "policy",
    [
        "snapkv:buffer=8",
        "snapkv:buffer=33,window=5,kernel_size=3",
        "rkv:buffer=11,window=7",
        "rkv+utility:buffer=9,delta=9",
        "snapkv:buffer=16,slot_order=score",
    ],
)
def test_known_products_change_nothing(compared, make_trace, policy, dtype):
    _replay(make_trace(n_tokens=150, dtype=dtype, head_dim=32), policy)
    # All but the first compressions, before which nothing was evicted nor measured.
    assert compared.n_known >= 2 * compared.n_unknown > 0


def test_products_are_known_only_where_the_window_was_measured(compared, make_trace):
    _replay(make_trace(n_tokens=150, head_dim=8), "snapkv:buffer=8,window=5")  # 10 columns are more than 8
    trace = make_trace(n_tokens=150, head_dim=32)
    _replay(trace, "snapkv:buffer=3,window=5")  # spans shorter than the window
    _replay(trace, "snapkv:buffer=8,window=4", sampling=Sampling(Fraction(1, 2)))
    _replay(trace, "snapkv:buffer=8,group_reduce=mean_weights,window=4")  # has no use for them
    _replay(trace, "tova:buffer=8")
    assert compared.n_known == 0
    assert compared.n_unknown > 20


@dataclass(frozen=True)
class Changed(SnapKV):
    """Scores keys and queries of its own making, as a user's scorer may."""

    name: ClassVar[str] = "changed"
    last: int = 4
    centred: bool = False

    def score_layer(self, layer, memory=None):
        layer = replace(layer, queries=layer.queries[:, :, -self.last :])
        if self.centred:
            layer = replace(layer, keys=[own - own.mean(axis=0) for own in layer.keys])
        return super().score_layer(layer)


@dataclass(frozen=True)
class Unaware(Changed):
    name: ClassVar[str] = "unaware"

    @property
    def reuses_products(self):
        return False


@pytest.mark.parametrize("given", [{"last": 4}, {"last": 8, "centred": True}])
def test_products_of_other_keys_or_queries_are_not_taken(make_trace, given):
    trace = make_trace(n_tokens=150, head_dim=32)
    outcomes = []
    for scorer in (Changed(**given), Unaware(**given)):
        policy = replace(parse_policy("snapkv:buffer=8"), scorer=scorer)
        outcomes += Engine([Request(trace, policy, 20)]).run()
    assert outcomes[0].n_evicted > 100
    np.testing.assert_array_equal(outcomes[0].evicted_at, outcomes[1].evicted_at)
    np.testing.assert_array_equal(outcomes[0].mass, outcomes[1].mass)


def test_products_end_with_the_compression_that_they_were_for(compared, make_trace):
    trace = make_trace(n_tokens=150, head_dim=32)
    sample = EVERYTHING.draw(trace, 0)
    mass = np.empty((trace.shape.n_query_heads, len(sample.steps)), np.float32)
    policy = parse_policy("snapkv:buffer=8")
    asked = {"seed": 0, "keep_retained": False, "protected": policy.protection.ends(trace.prompt_tokens, 20)}
    layer = LayerReplay(trace, 0, policy, 20, **asked, sample=sample, mass=mass)
    layer.prefill()
    for n_tokens in (60, 90):
        layer.advance(n_tokens)
        layer.compress()
    assert compared.n_known == 1
    layer.compress()
    assert compared.n_known == 1
