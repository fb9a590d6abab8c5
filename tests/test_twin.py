"""The replay and its slow twin tell the same story, compression by compression."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from agreement import agree, replayed
from cases import MODERATE, cases, draw_arrays
from hypothesis import given, settings

from simulator import compression, layer_replay
from simulator.policies.random import Random
from simulator.policies.rkv import RKV
from simulator.policies.snapkv import SnapKV
from simulator.policies.triggers import BufferFull, EveryN

POLICIES = [
    "fullkv",
    "streamingllm:buffer=5",
    "snapkv:buffer=8",
    "snapkv:buffer=3,group_reduce=mean_weights",
    "snapkv:buffer=3,group_reduce=max_weights,slot_order=score",
    "rkv:buffer=8",
    "rkv:buffer=8,slot_order=score,no_match=column0",
    "rkv:trigger=every-n,interval=7,offset=2",
    "rkv:prompt=wait,buffer=3",
    "pyramid-rkv:buffer=8",
    "reasonalloc:buffer=8",
    "reasonalloc:buffer=4,delta=8,pooling=length",
    "rkv+utility:buffer=1,delta=5,mu=0.5",
    "snapkv+pyramid+utility:buffer=4,delta=4",
    "streamingllm+wave:buffer=8",
    "random:buffer=8",
    "random-prompt:buffer=8",
    "random-prompt+utility:buffer=4,delta=8,recent=3",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_is_the_twin_on_gaussian_data(policy, make_trace):
    trace = make_trace(n_layers=3, n_kv_heads=3, n_tokens=110, prompt_tokens=31)
    agreement = agree(trace, policy, 17, demand=[40, 3, 12], seed=5)
    assert not agreement.adopted  # no near-tie: every set, order and budget was equal
    assert agreement.n_decisions > 50 or policy == "fullkv"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_replay_is_the_twin_in_every_storage_type(dtype, make_trace):
    trace = make_trace(dtype=dtype, scale=0.2)
    assert not agree(trace, "rkv+utility:buffer=4,delta=4", 12).adopted


def test_replay_is_the_twin_at_large_logits(make_trace, rng):
    # Logits reach 100, where float32 overflows without care and resolves 1e-5 of a weight.
    arrays = 6 * rng.normal(size=(2, 4, 60, 8)), 6 * rng.normal(size=(2, 2, 60, 8))
    trace = make_trace(arrays=arrays)
    assert np.abs(trace.queries(0)[0] @ trace.keys(0)[0].T).max() * trace.scale > 90
    agree(trace, "streamingllm:buffer=5", 17, atol=1e-4)
    outcome, _ = replayed(trace, "rkv:buffer=5", 17)
    assert np.isfinite(outcome.mass).all()


def test_replay_is_the_twin_when_spans_are_measured_in_blocks(make_trace, monkeypatch):
    monkeypatch.setattr(layer_replay, "_BLOCK_ELEMENTS", 6000)
    trace = make_trace(n_tokens=90)
    assert not agree(trace, "snapkv:buffer=33", 20).adopted
    assert not agree(trace, "fullkv", 20).adopted


def test_replay_is_the_twin_on_anything(shared_folder):
    account = Counter()

    @settings(MODERATE, max_examples=200)
    @given(cases())
    def check(case):
        trace = case.write(shared_folder)
        agreement = agree(trace, case.policy, case.entries, demand=case.demand, seed=case.seed % 1000)
        account["decisions"] += agreement.n_decisions
        account[case.kind] += sum(agreement.adopted.values())
        account.update(agreement.adopted)

    check()
    assert account["decisions"] > 2000
    assert account["gaussian"] <= 1
    assert account["repeated"] + account["quantised"] < 0.01 * account["decisions"]


def test_similarities_at_the_threshold_are_near_ties(make_trace):
    # Keys of -1, 0 and 1 have cosines of exactly 0.5, which single precision may round to either side.
    arrays = draw_arrays(np.random.default_rng(1), "quantised", 1, 2, 2, 60, 8)
    agreement = agree(make_trace(arrays=arrays), "rkv:buffer=6", 20)
    assert agreement.adopted["near-tie"] + agreement.adopted["exact tie"] <= 2


def _earlier_tie(scores, positions, n_kept, slot_order):
    return np.sort(np.lexsort((positions, -scores))[:n_kept])


def test_twin_notices_ties_that_go_to_the_earlier_position(make_trace, monkeypatch):
    trace = make_trace()
    monkeypatch.setattr(compression, "select_slots", _earlier_tie)
    assert agree(trace, "snapkv:buffer=8", 17).adopted["exact tie"]  # where none is right, see above


@pytest.mark.parametrize(
    ("owner", "name", "broken", "policy"),
    [
        (BufferFull, "buffer", 9, "rkv:buffer=8"),
        (SnapKV, "recent", 7, "snapkv:buffer=8"),
        (RKV, "similarity_threshold", 0.6, "rkv:buffer=8"),
        (EveryN, "offset", 1, "rkv:trigger=every-n,interval=8"),
        (Random, "recent", 9, "random:buffer=8"),
    ],
)
def test_twin_notices_a_changed_rule(owner, name, broken, policy, make_trace, monkeypatch):
    trace = make_trace()
    agree(trace, policy, 17)
    monkeypatch.setattr(owner, name, property(lambda self: broken, lambda self, value: None))
    with pytest.raises(AssertionError):
        agree(trace, policy, 17)
