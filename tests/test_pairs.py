"""A processor that multiplies pairs of bfloat16 numbers gives the very results of one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import tiles
from simulator.engine import Engine
from simulator.full_cache import FullCache
from simulator.policy import parse_policy
from simulator.request import Request

pytestmark = pytest.mark.skipif(not tiles.HAS_PAIRS, reason="this processor multiplies no pairs")


@pytest.mark.parametrize("head_dim", [34, 128])
@pytest.mark.parametrize(
    "policy",
    ["snapkv:buffer=8", "rkv+utility:buffer=11,delta=11", "vatp:buffer=9,sinks=2", "snapkv:slot_order=score"],
)
def test_replays_are_equal(make_trace, rng, monkeypatch, policy, head_dim):
    values = rng.normal(size=(2, 2, 150, head_dim))
    trace = make_trace(n_tokens=150, dtype="bfloat16", head_dim=head_dim, values=values)
    outcomes = []
    for has_pairs in (True, False):
        monkeypatch.setattr(tiles, "HAS_PAIRS", has_pairs)
        (outcome,) = Engine([Request(trace, parse_policy(policy), 20)]).run()
        outcomes.append(outcome)
    first, second = outcomes
    assert first.n_evicted > 100
    np.testing.assert_array_equal(first.evicted_at, second.evicted_at)
    np.testing.assert_array_equal(first.mass, second.mass)


def test_full_caches_are_equal(make_trace, monkeypatch):
    trace = make_trace(n_tokens=150, dtype="bfloat16", head_dim=34)
    found = []
    for has_pairs in (True, False):
        monkeypatch.setattr(tiles, "HAS_PAIRS", has_pairs)
        found.append(FullCache(trace))
    np.testing.assert_array_equal(found[0].strongest, found[1].strongest)
    np.testing.assert_array_equal(found[0].largest, found[1].largest)
