"""Redundancy that is kept up to date equals redundancy computed whole, whatever happened before."""

from __future__ import annotations

import naive_rules
import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.compression import Compressor
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.kernels.duplicates import Redundancy
from simulator.policies.language import parse_policy

TOTAL, WIDTH = 160, 4

histories = st.lists(st.tuples(st.integers(0, 25), st.floats(0, 1)), min_size=1, max_size=8)


def redundancy(keys, positions, threshold, *, spare_column0=False, memory=None):
    """Ask about one KV head, anew unless there is a memory."""
    memory = memory or Redundancy(threshold, spare_column0=spare_column0)
    return memory.shares([keys], [positions])[0]


def whole(keys, threshold, spare_column0):
    """Give the softmax of mean cosines as it is written: every pair, row by row."""
    n, similar = len(keys), naive_rules.cosines(keys.astype(np.float64)).tolist()
    for i in range(n):
        duplicates = [j for j in range(n) if j != i and similar[i][j] > threshold]
        similar[i][i] = 0.0
        if duplicates:
            similar[i][duplicates[-1]] = 0.0
        elif spare_column0:
            similar[i][0] = 0.0
    return naive_rules.softmax([sum(row[j] for row in similar) / n for j in range(n)])


def alike(threshold, seed):
    """Give keys of which many are alike, no two with a cosine near the threshold."""
    while True:
        rng = np.random.default_rng(seed)
        keys = rng.normal(size=(TOTAL, WIDTH)) + rng.normal(size=(12, WIDTH))[rng.integers(12, size=TOTAL)]
        keys = keys.astype(np.float32)
        similar = naive_rules.cosines(keys.astype(np.float64))
        np.fill_diagonal(similar, 2)
        if np.abs(similar - threshold).min() > 1e-6:
            return keys
        seed += 10**6


@given(histories, st.sampled_from([-1.0, 0.2, 0.5, 0.8]), st.booleans(), st.integers(0, 10**5))
@MODERATE
def test_incremental_is_whole_over_any_history(history, threshold, spare_column0, seed):
    keys, rng = alike(threshold, seed), np.random.default_rng(seed)
    held, n_tokens = np.empty(0, np.int32), 0
    memory = Redundancy(threshold, spare_column0=spare_column0)
    for n_added, share in history:
        stop = min(TOTAL, n_tokens + n_added)
        held = np.concatenate([held, np.arange(n_tokens, stop, dtype=np.int32)])
        n_tokens = stop
        if not len(held):
            continue
        asked = {"spare_column0": spare_column0}
        kept_up = redundancy(keys[held], held, threshold, memory=memory, **asked)
        np.testing.assert_allclose(kept_up, redundancy(keys[held], held, threshold, **asked), rtol=2e-6)
        np.testing.assert_allclose(kept_up, whole(keys[held], threshold, spare_column0), rtol=2e-6)
        # Asked twice, it says the same, bit for bit.
        np.testing.assert_array_equal(
            kept_up, redundancy(keys[held], held, threshold, memory=memory, **asked)
        )
        held = held[rng.random(len(held)) < share]


def test_what_came_since_is_compared_with_all():
    keys, held, memory = alike(0.5, 1), np.arange(TOTAL, dtype=np.int32), Redundancy(0.5, spare_column0=False)
    redundancy(keys[:100], held[:100], 0.5, memory=memory)
    kept = np.delete(held, np.arange(5, 95, 2))
    found = redundancy(keys[kept], kept, 0.5, memory=memory)
    np.testing.assert_allclose(found, whole(keys[kept], 0.5, False), rtol=2e-6)


def test_only_entries_in_their_old_order_are_remembered():
    keys, held, memory = alike(0.2, 2), np.arange(TOTAL, dtype=np.int32), Redundancy(0.2, spare_column0=False)
    for slots in (held[:90], held[30:60][::-1], held[20:80]):
        found = redundancy(keys[slots], slots, 0.2, memory=memory)
        np.testing.assert_allclose(found, redundancy(keys[slots], slots, 0.2), rtol=2e-6)


def test_heads_may_be_asked_about_together_or_apart():
    keys, memory = [alike(0.5, seed) for seed in (3, 4, 5)], Redundancy(0.5, spare_column0=False)
    for lengths in ((90, 90, 90), (110, 0, 130), (120, 100, 130), (TOTAL, TOTAL, TOTAL)):
        some = [own[:n] for own, n in zip(keys, lengths, strict=True)]
        found = memory.shares(some, [np.arange(n, dtype=np.int32) for n in lengths])
        for own, shares in zip(some, found, strict=True):
            if len(own):
                np.testing.assert_allclose(shares, whole(own, 0.5, False), rtol=2e-6)
                alone = redundancy(own, np.arange(len(own), dtype=np.int32), 0.5)
                np.testing.assert_array_equal(shares, alone)


class Forgets(Compressor):
    """Has no memory of what was compared before."""

    def score(self, *given):
        self._memory = self.policy.scorer.new_memory()
        return super().score(*given)


POLICIES = [
    "rkv:buffer=8",
    "rkv:buffer=8,no_match=column0",
    "rkv:buffer=3,slot_order=score",
    "rkv+utility:buffer=4,delta=4,redistribute=true",
    "rkv+adakv:buffer=5,uniform_share=0",
    "rkv+wave-dynamic:buffer=4,layer_delta=16",
    "rkv:trigger=every-n,interval=7,prompt=wait",
]


def outcome_of(trace, policy, jobs=1):
    (outcome,) = Engine([Request(trace, parse_policy(policy), 14, keep_retained=True)], jobs).run()
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_replay_with_and_without_memory_is_the_same(policy, make_trace, monkeypatch):
    rng = np.random.default_rng(4)
    arrays = rng.normal(size=(3, 4, 110, 8)), rng.normal(size=(3, 2, 110, 8)) + 0.5
    trace = make_trace(arrays=arrays)
    first = outcome_of(trace, policy)
    monkeypatch.setattr("simulator.engine.layer.Compressor", Forgets)
    without = outcome_of(trace, policy)
    monkeypatch.undo()
    for again in (without, outcome_of(trace, policy), outcome_of(trace, policy, jobs=4)):
        np.testing.assert_array_equal(first.mass, again.mass)
        np.testing.assert_array_equal(first.evicted_at, again.evicted_at)
    assert first.n_evicted > 100
