"""Protection, ranking and ties, settled in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.selection import select_slots
from simulator.policies.contract import checked_scores
from simulator.policies.parts import PolicyError, Scorer
from simulator.policies.view import CacheView, LayerView

INFINITY = np.float32(np.inf)


@st.composite
def scored_slots(draw):
    """Draw scores with ties, positions in any slot order, and how many leading and last are protected."""
    n = draw(st.integers(1, 25))
    positions = sorted(draw(st.sets(st.integers(0, 60), min_size=n, max_size=n)))
    sinks, recent = draw(st.integers(0, n // 2)), draw(st.integers(0, n // 2))
    scores = draw(st.lists(st.integers(-2, 2).map(float), min_size=n, max_size=n))
    scores = [float("inf") if i < sinks or i >= n - recent else score for i, score in enumerate(scores)]
    slots = draw(st.permutations(range(n)))
    n_kept = draw(st.integers(max(sinks + recent, 1), n))
    return [scores[i] for i in slots], [positions[i] for i in slots], n_kept


def ranked(scores, positions):
    """Best first, ties to the later position."""
    return [position for _, position in sorted(zip(scores, positions, strict=True), reverse=True)]


def selected(scores, positions, n_kept, slot_order):
    arrays = np.array(scores, np.float32), np.array(positions, np.int32)
    return arrays[1][select_slots(*arrays, n_kept, slot_order)].tolist()


@given(scored_slots())
@MODERATE
def test_best_survive_in_time_order(drawn):
    scores, positions, n_kept = drawn
    kept = selected(scores, positions, n_kept, "chronological")
    assert kept == sorted(ranked(scores, positions)[:n_kept])


@given(scored_slots())
@MODERATE
def test_score_order_is_best_first_between_sinks_and_window(drawn):
    scores, positions, n_kept = drawn
    kept = selected(scores, positions, n_kept, "score")
    assert sorted(kept) == sorted(ranked(scores, positions)[:n_kept])
    protected = {p for score, p in zip(scores, positions, strict=True) if score == float("inf")}
    chosen = [position for position in kept if position not in protected]
    assert chosen == [p for p in ranked(scores, positions) if p in set(chosen)]
    if chosen:
        first, last = kept.index(chosen[0]), kept.index(chosen[-1])
        assert kept[:first] == sorted(p for p in protected if p < min(chosen))
        assert kept[last + 1 :] == sorted(p for p in protected if p > min(chosen))


@given(scored_slots())
@MODERATE
def test_larger_budget_retains_a_superset(drawn):
    scores, positions, n_kept = drawn
    smaller = selected(scores, positions, n_kept, "chronological")
    for larger in range(n_kept, len(positions) + 1):
        assert set(smaller) <= set(selected(scores, positions, larger, "chronological"))


def test_ties_go_to_the_later_position_wherever_it_stands():
    assert selected([1, 1, 1, 1], [7, 3, 9, 5], 2, "chronological") == [7, 9]
    assert selected([1, 1, 1, 1], [7, 3, 9, 5], 3, "score") == [9, 7, 5]
    assert selected([0, -0.0, 0, -0.0], [0, 1, 2, 3], 2, "chronological") == [2, 3]


@dataclass(frozen=True)
class Given(Scorer):
    """Returns what the test gives it."""

    name: ClassVar[str] = "given"
    scores: object = None
    kv_head: int = 0
    sinks: int = 0
    recent: int = 0

    def score(self, view):
        return self.scores if view.kv_head == self.kv_head else np.zeros(view.n_entries)


def view_of(n, n_tokens=None, **changes):
    arrays = {
        "keys": np.zeros((n, 4), np.float32),
        "positions": np.arange(n, dtype=np.int32),
        "queries": np.zeros((2, 3, 4), np.float32),
    }
    n_tokens = n if n_tokens is None else n_tokens
    place = {"scale": 0.5, "n_tokens": n_tokens, "prompt_tokens": 1, "layer": 3, "kv_head": 1, "seed": 0}
    return CacheView(**(arrays | place | changes))


def test_protected_entries_are_beyond_any_score():
    view = view_of(5, positions=np.array([0, 2, 5, 8, 9], np.int32), n_tokens=10)
    (scores,) = checked_scores(Given([1.0, 2, 3, 4, 5], sinks=2, recent=2), LayerView.of([view]))
    np.testing.assert_array_equal(scores, [INFINITY, 2, 3, INFINITY, INFINITY])
    assert scores.dtype == np.float32


@pytest.mark.parametrize(
    ("scores", "named"),
    [
        ([1.0, 2, 3], r"shape \(3,\); allowed: \(4,\)"),
        ([[1.0, 2, 3, 4]], "shape"),
        (1.0, "shape"),
        ([1.0, np.nan, 3, 4], "nan at slot 1 of layer 3, KV head 1"),
        ([1.0, 2, np.inf, 4], "inf at slot 2"),
        ([-np.inf, 2, 3, 4], "-inf at slot 0"),
    ],
)
def test_broken_scores_are_refused_in_words(scores, named):
    with pytest.raises(PolicyError, match=named):
        checked_scores(Given(scores, kv_head=1), LayerView.of([view_of(4), view_of(4)]))


def test_view_is_read_only_and_its_source_is_not():
    keys = np.zeros((3, 4), np.float32)
    view = view_of(3, keys=keys)
    for name in ("keys", "positions", "queries"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(view, name)[0] = 1
    keys[0] = 1
    assert view.n_entries == 3
