"""What allocators are asked for: requests of a few numbers, and views whose attention is given."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from simulator.policies.parts import LayerRequest
from simulator.policies.view import CacheView
from simulator.policies.wave import Wave

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
