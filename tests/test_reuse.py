"""Scores are the same whether the window's products are taken from the span just measured or found anew."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from simulator import layer_replay
from simulator.compression import Compressor
from simulator.engine import Engine
from simulator.policy import parse_policy
from simulator.request import Request
from simulator.sampling import Sampling


class Compares(Compressor):
    """Scores twice wherever products are known."""

    n_known = n_unknown = 0

    def score(self, keys, positions, queries, n_tokens, values=None, products=None):
        found = super().score(keys, positions, queries, n_tokens, values, products)
        if products is None:
            Compares.n_unknown += 1
        else:
            Compares.n_known += 1
            anew = super().score(keys, positions, queries, n_tokens, values)
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
    _replay(make_trace(n_tokens=150, dtype=dtype), policy)
    # All but the first compressions, before which nothing was evicted nor measured.
    assert compared.n_known >= 2 * compared.n_unknown > 0


def test_products_are_known_only_where_the_window_was_measured(compared, make_trace):
    trace = make_trace(n_tokens=150)
    _replay(trace, "snapkv:buffer=3,window=5")  # spans shorter than the window
    _replay(trace, "snapkv:buffer=8,window=4", sampling=Sampling(Fraction(1, 2)))
    _replay(trace, "snapkv:buffer=8,group_reduce=mean_weights,window=4", sampling=Sampling(Fraction(1, 2)))
    _replay(trace, "tova:buffer=8")
    assert compared.n_known == 0
    assert compared.n_unknown > 20
