"""Every scorer with every layer and head allocator: the rules of a budget hold for all of them."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations, product

import numpy as np
import pytest
from agreement import make_wave

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS

ENTRIES, BUFFER, N_TOKENS = 14, 4, 48
# Sizes that suit a tiny trace, for whoever has such a parameter.
SMALL = {
    "window": 4,
    "sinks": 2,
    "lag": 3,
    "n_future": 16,
    "cake_window": 4,
    "layer_delta": 7,
    "code_beta": 4,
    "delta": 6,
    "layer_shares": "2/1/1",
    "head_shares": "1/2",
    "buffer": BUFFER,
}
EVICTING = [name for name in SCORERS if name != "fullkv"]


def small(text):
    """Read a policy with small parameters."""
    policy = parse_policy(text)
    parts = (policy.scorer, policy.layers, policy.heads, policy.trigger)
    known = {item.name for part in parts for item in fields(part)}
    return parse_policy(text, **{name: value for name, value in SMALL.items() if name in known})


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    from traces import write_trace

    rng = np.random.default_rng(7)
    queries = rng.normal(size=(3, 4, N_TOKENS, 8))
    keys, values = rng.normal(size=(2, 3, 2, N_TOKENS, 8))
    rope = {"rope_theta": 10_000.0, "rope_type": "default"}
    path = tmp_path_factory.mktemp("products") / "tiny.kvtrace"
    return write_trace(path, queries, keys, values=values, prompt_tokens=20, rope=rope)


def test_there_are_over_four_hundred_products():
    assert len(EVICTING) * len(LAYER_ALLOCATORS) * len(HEAD_ALLOCATORS) > 400


def products():
    """Give all products; a third, in which every two parts meet, is tried on every run."""
    parts = (EVICTING, LAYER_ALLOCATORS, HEAD_ALLOCATORS)
    for (i, scorer), (j, layers), (k, heads) in product(*map(enumerate, parts)):
        yield pytest.param(scorer, layers, heads, marks=() if (i + j + k) % 3 == 0 else pytest.mark.nightly)


@pytest.mark.slow
@pytest.mark.parametrize(("scorer", "layers", "heads"), list(products()))
def test_all_products_keep_the_rules(scorer, layers, heads, trace):
    wave = make_wave(trace, [9, 3, 5])
    policy = small(f"{scorer}+{layers}+{heads}")
    request = Request(trace, policy, ENTRIES, waves={trace.model: wave}, keep_retained=True, seed=3)
    (outcome,) = Engine([request]).run()
    check(policy, outcome, trace)


def test_every_two_parts_meet_in_what_every_run_tries():
    parts = (EVICTING, LAYER_ALLOCATORS, HEAD_ALLOCATORS)
    tried = [case.values for case in products() if not case.marks]
    for one, other in combinations(range(3), 2):
        assert {(case[one], case[other]) for case in tried} == set(product(parts[one], parts[other]))


def check(policy, outcome, trace):
    name, n_layers, n_kv_heads = policy.name, 3, 2
    assert outcome.mass.shape == (n_layers, 4, N_TOKENS - 20)
    assert outcome.mass.min() > 0, name
    assert outcome.mass.max() <= 1 + 1e-5, name
    assert outcome.n_evicted > 0, name
    totals = {}
    for division in outcome.divisions:
        assert (division.budgets >= policy.protected_of(0, 99)).all(), name
        assert (division.lengths <= division.budgets).all(), name
        totals.setdefault(division.layer, []).append(int(division.budgets.sum()))
    assert len(totals) == n_layers, name
    if not policy.layers.dynamic:
        assert all(len(set(own)) == 1 for own in totals.values()), name
        total = sum(own[0] for own in totals.values())
        assert total == n_layers * n_kv_heads * ENTRIES or not policy.layers.exact, name
    held = {}
    for kept in outcome.retained:
        before = held.get((kept.layer, kept.kv_head))
        arrived = range(0 if before is None else before[1], kept.n_tokens)
        own = set(kept.positions.tolist())
        assert len(own) == len(kept.positions), name
        assert own <= (set(arrived) if before is None else before[0] | set(arrived)), name
        assert own >= set(range(min(policy.scorer.sinks, kept.n_tokens))), name
        assert own >= set(range(kept.n_tokens - policy.scorer.recent, kept.n_tokens)), name
        held[kept.layer, kept.kv_head] = own, kept.n_tokens
