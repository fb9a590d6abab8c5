"""AdaKV's budgets of KV heads, against the slow twin and by hand."""

from __future__ import annotations

import math

import naive_allocators
import naive_rules
import numpy as np
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.policies.heads.adakv import AdaKV, wins
from simulator.policies.parts import HeadRequest


@st.composite
def contests(draw):
    """Draw scores of a few heads, many of them tied, the protected infinite; and a total they can hold."""
    protected = draw(st.integers(0, 4))
    values = st.sampled_from([0.0, 0.5, 1.0, 1e-30, 3e38]) | st.floats(-5, 5, width=32)
    scores = [
        np.array([*draw(st.lists(values, max_size=30)), *[np.inf] * protected], np.float32)
        for _ in range(draw(st.integers(1, 5)))
    ]
    total = draw(st.integers(len(scores) * protected, len(scores) * (protected + 25)))
    return scores, total, protected


@given(contests(), st.sampled_from(["blend", "floor"]), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@MODERATE
def test_adakv_is_the_twin_and_keeps_its_bounds(contest, form, uniform_share):
    scores, total, protected = contest
    allocator, n = AdaKV(form=form, uniform_share=uniform_share), len(scores)
    budgets, binding = allocator.allocate(HeadRequest(scores, total, protected))
    assert budgets.sum() == total
    assert not binding
    evictable = total - n * protected
    least = uniform_share * evictable / n
    for budget, own in zip(budgets.tolist(), scores, strict=True):
        if form == "blend":
            assert budget - protected >= math.floor(least + 1e-6) - (uniform_share == 1.0)
        else:
            assert budget - protected >= min(math.floor(least), len(own) - protected)
    rules = naive_rules.Rules(heads="adakv", form=form, uniform_share=uniform_share)
    safe, pooled, n_places = naive_allocators.competitors(rules, [own.tolist() for own in scores], evictable)
    winners, _ = naive_allocators.winners_of(pooled, n_places)
    shares = naive_allocators.adakv_shares(rules, safe, winners, evictable)
    rounded = naive_rules.round_to_total([round(share, 6) for share in shares], evictable)
    assert np.abs(budgets - protected - rounded).max() <= (len(set(shares)) > 1)


def test_adakv_by_hand():
    scores = [
        np.array(own, np.float32) for own in ([9, 8, 7, 6, 5, 4], [3, 2, 1, 0.5, 0, 0], [4, 0, 0, 0, 0, 0])
    ]
    free = AdaKV(uniform_share=0.0).allocate(HeadRequest(scores, 9, 0))[0]
    # The best nine: all six of the first head, one of the last, two of the second.
    assert free.tolist() == [6, 2, 1]
    # Shares 6, 2 and 1 are blended by half with three each.
    assert AdaKV(uniform_share=0.5).allocate(HeadRequest(scores, 9, 0))[0].tolist() == [5, 2, 2]
    # Two of each head are safe, and the best three others are the first head's.
    guarded = AdaKV(form="floor", uniform_share=0.7).allocate(HeadRequest(scores, 9, 0))[0]
    assert guarded.tolist() == [5, 2, 2]
    assert AdaKV(uniform_share=1.0).allocate(HeadRequest(scores, 10, 0))[0].tolist() == [4, 3, 3]


def test_adakv_shares_ties_at_the_last_place_alike():
    tied = [np.zeros(8, np.float32), np.zeros(8, np.float32), np.zeros(4, np.float32)]
    assert wins(tied, 10).tolist() == [4, 4, 2]
    assert wins(tied, 0).tolist() == [0, 0, 0]
    assert wins(tied, 26).tolist() == [10, 10, 6]
    assert AdaKV(uniform_share=0.0).allocate(HeadRequest(tied, 10, 0))[0].tolist() == [4, 4, 2]


def test_adakv_compares_heads_beyond_the_protected():
    inf = np.inf
    scores = [np.array(own, np.float32) for own in ([inf, inf, 5, 4, 3], [inf, inf, 2, 1, 0])]
    assert AdaKV(uniform_share=0.0).allocate(HeadRequest(scores, 7, 2))[0].tolist() == [5, 2]
