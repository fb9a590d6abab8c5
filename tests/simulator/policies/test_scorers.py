"""What holds for every scorer: protection, exact counts, symmetry of the heads, finite scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from agreement import agree
from cases import MODERATE, OTHER_SCORERS, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compression import Compressor, Held
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.contract import checked_scores
from simulator.policies.language import parse_policy
from simulator.policies.rope import read_rope
from simulator.policies.scorers.accumulated import preferred
from simulator.policies.scorers.append_only import AppendOnly
from simulator.policies.scorers.criticalkv import CriticalKV
from simulator.policies.scorers.expected_attention import ExpectedAttention
from simulator.policies.scorers.h2o import H2O
from simulator.policies.scorers.keydiff import KeyDiff
from simulator.policies.scorers.lagkv import LagKV
from simulator.policies.scorers.snapkv_paper import PaperSnapKV
from simulator.policies.scorers.tova import TOVA
from simulator.policies.scorers.vatp import VATP
from simulator.policies.scorers.window import average_pool
from simulator.policies.shipped import SCORERS
from simulator.policies.view import CacheView, LayerView

NAMES = [name for name in SCORERS if name != "fullkv"]
ROPE = {"rope_theta": 50.0}
# Small enough for caches of a few dozen entries.
SMALL = {"window": 5, "kernel_size": 3, "lag": 4, "n_future": 6, "sinks": 3, "recent": 2}


def small(name):
    """Spell a policy of the scorer with a small window and lag, and few sinks."""
    known = {item.name for item in fields(SCORERS[name])}
    chosen = [f"{key}={value}" for key, value in SMALL.items() if key in known]
    return parse_policy(f"{name}:" + ",".join(["buffer=4", *chosen]))


class Sequence:
    """Keys, values and queries of one layer, fed to a policy's compressor a few tokens at a time."""

    def __init__(self, policy, arrays, entries, prompt_tokens) -> None:
        self.queries, self.keys, self.values = (array.astype(np.float32) for array in arrays)
        self.policy, self.n_tokens = policy, prompt_tokens
        n_kv_heads, _, head_dim = self.keys.shape
        self.compressor = Compressor(
            policy,
            0,
            entries,
            protected=policy.protection.ends(prompt_tokens, entries),
            n_kv_heads=n_kv_heads,
            prompt_tokens=prompt_tokens,
            scale=head_dim**-0.5,
            seed=7,
            rope=read_rope(ROPE, head_dim),
        )
        self.positions = [np.arange(prompt_tokens, dtype=np.int32) for _ in range(n_kv_heads)]

    def scores(self):
        first = self.n_tokens - self.compressor.n_queries(self.n_tokens)
        held = Held(
            [self.keys[head][held] for head, held in enumerate(self.positions)],
            self.positions,
            [self.values[head][held] for head, held in enumerate(self.positions)],
        )
        return self.compressor.score(held, self.queries[:, first : self.n_tokens], self.n_tokens)

    def compress(self):
        """Compress; give what each head held before and the slots it keeps, None for all."""
        before = self.positions
        slots = self.compressor.survivors(self.scores(), before)
        pairs = zip(before, slots, strict=True)
        self.positions = [held if kept is None else held[kept] for held, kept in pairs]
        return before, slots

    def decode(self, n):
        arrived = np.arange(self.n_tokens, self.n_tokens + n, dtype=np.int32)
        self.n_tokens += n
        self.positions = [np.concatenate([held, arrived]) for held in self.positions]


def draw_arrays(rng, n_kv_heads=2, group_size=2, n_tokens=60, head_dim=6):
    shapes = [(n_kv_heads * group_size, n_tokens, head_dim), *[(n_kv_heads, n_tokens, head_dim)] * 2]
    return [rng.normal(size=shape) for shape in shapes]


@st.composite
def runs(draw):
    """Draw a seed, a number of KV heads, a budget, a prompt length and how tokens arrive."""
    seed, n_kv_heads = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 3))
    entries, prompt_tokens = draw(st.integers(9, 25)), draw(st.integers(1, 40))
    spans = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    return seed, n_kv_heads, entries, prompt_tokens, spans


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(runs())
@settings(MODERATE, max_examples=25)
def test_protected_entries_survive_and_counts_are_exact(name, drawn):
    seed, n_kv_heads, entries, prompt_tokens, spans = drawn
    policy = small(name)
    arrays = draw_arrays(np.random.default_rng(seed), n_kv_heads, n_tokens=prompt_tokens + sum(spans))
    sequence = Sequence(policy, arrays, entries, prompt_tokens)
    for span in (0, *spans):
        sequence.decode(span)
        before, _ = sequence.compress()
        quota = policy.scorer.quota(entries, sequence.n_tokens)
        assert quota <= entries
        for held, kept in zip(before, sequence.positions, strict=True):
            protected = held[
                (held < policy.scorer.sinks) | (held >= sequence.n_tokens - policy.scorer.recent)
            ]
            assert len(kept) == min(quota, len(held))
            assert set(protected) <= set(kept) <= set(held)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "vase" and not name.startswith("random")])
@given(runs())
@settings(MODERATE, max_examples=15)
def test_permuting_the_heads_permutes_what_they_keep(name, drawn):
    seed, _, entries, prompt_tokens, spans = drawn
    rng = np.random.default_rng(seed)
    queries, keys, values = draw_arrays(rng, 3, n_tokens=prompt_tokens + sum(spans))
    order = [2, 0, 1]
    grouped = queries.reshape(3, 2, *queries.shape[1:])
    permuted = [grouped[order].reshape(queries.shape), keys[order], values[order]]
    own = Sequence(small(name), [queries, keys, values], entries, prompt_tokens)
    other = Sequence(small(name), permuted, entries, prompt_tokens)
    for span in (0, *spans):
        for sequence in (own, other):
            sequence.decode(span)
            sequence.compress()
        for place, head in enumerate(order):
            np.testing.assert_array_equal(other.positions[place], own.positions[head])


@pytest.mark.parametrize("name", NAMES)
def test_budgets_at_the_length_evict_nothing(name, rng):
    for more in (0, 3):
        policy = small(name)
        if name == "append-only":
            policy = parse_policy("append-only:window=5,rate=1")
        sequence = Sequence(policy, draw_arrays(rng), 40 + more, 40)
        _, slots = sequence.compress()
        assert slots == [None, None]


DEGENERATE = {
    "zero keys": lambda q, k, v: (q, k * 0, v),
    "all zero": lambda q, k, v: (q * 0, k * 0, v * 0),
    "one key for all": lambda q, k, v: (q, np.broadcast_to(k[:, :1], k.shape), v),
    "one token for all": lambda q, k, v: (q, *(np.broadcast_to(a[:, :1], a.shape) for a in (k, v))),
    "huge logits": lambda q, k, v: (1e4 * q, 1e4 * k, v),
    "huge values": lambda q, k, v: (q, k, 6e4 * v),
    "tiny numbers": lambda q, k, v: (1e-20 * q, 1e-20 * k, 1e-20 * v),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_on_degenerate_input(name, kind, rng):
    arrays = DEGENERATE[kind](*draw_arrays(rng))
    sequence = Sequence(small(name), arrays, 20, 30)
    for span in (0, 4, 9):
        sequence.decode(span)
        for held, scores in zip(sequence.positions, sequence.scores(), strict=True):  # a look only
            scorer = sequence.policy.scorer
            protected = (held < scorer.sinks) | (held >= sequence.n_tokens - scorer.recent)
            np.testing.assert_array_equal(np.isinf(scores), protected)
        sequence.compress()
        assert [len(kept) for kept in sequence.positions] == [scorer.quota(20, sequence.n_tokens)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_SCORERS)
def test_replay_is_the_twin_on_anything(name, shared_folder):
    account = Counter()

    @settings(MODERATE, max_examples=30)
    @given(cases(scorer=name))
    def check(case):
        trace = case.write(shared_folder)
        agreement = agree(trace, case.policy, case.entries, demand=case.demand, seed=case.seed % 1000)
        account["decisions"] += agreement.n_decisions
        account["adopted"] += sum(agreement.adopted.values())

    check()
    assert account["decisions"] > 100
    assert account["adopted"] <= 0.02 * account["decisions"]


# ---- mutations: the twin has to notice --------------------------------------------------------------------


def _alone(self, layer, memory=None, together=TOVA.score_layer):
    return [together(self, LayerView.of([view]))[0] for view in layer.heads]


def _forgetful(self, view, observe=H2O.observe):
    return observe(self, view) - view.state


def _attention_alone(self, view):
    return H2O.score(self, view)


def _window_is_admitted(self, layer, memory=None, score=AppendOnly.score_layer):
    found = score(self, layer)
    for scores, held in zip(found, layer.positions, strict=True):
        scores[(held < layer.since) & (held >= layer.since - self.window)] = scores.max()
    return found


def _nearest_to_the_mean(self, view, score=KeyDiff.score):
    return -score(self, view)


def _edge_divided_by_what_is_there(values, kernel_size):
    half = kernel_size // 2
    found = [values[max(0, j - half) : j + half + 1].mean() for j in range(len(values))]
    return np.array(found, np.float32)


def _turned_forward(self, view, estimate=ExpectedAttention.future_queries):
    turned = view.rope.rotate(view.queries, 2 * view.query_positions).astype(np.float32)
    changed = {name: getattr(view, name) for name in CacheView.__dataclass_fields__}
    return estimate(self, CacheView(**(changed | {"queries": turned})))


MUTATIONS = [
    (H2O, "observe", _forgetful, "h2o:buffer=4"),
    (H2O, "recent_share", 0.4, "h2o:buffer=4"),
    (VATP, "score", _attention_alone, "vatp:buffer=4,sinks=2"),
    (TOVA, "score_layer", _alone, "tova:buffer=4"),
    (TOVA, "recent", 2, "tova:buffer=1"),
    (PaperSnapKV, "kernel_size", 3, "snapkv-paper:buffer=4,window=4"),
    (CriticalKV, "first_stage_share", 0.9, "criticalkv:buffer=4,window=4"),
    (CriticalKV, "epsilon", 0.1, "criticalkv:buffer=4,window=4"),
    (KeyDiff, "score", _nearest_to_the_mean, "keydiff:buffer=4"),
    (LagKV, "lag", 5, "lagkv:buffer=4,lag=4"),
    (LagKV, "score_source", "keys", "lagkv:buffer=4,lag=4"),
    (ExpectedAttention, "future_queries", _turned_forward, "expected-attention:buffer=4,window=9,n_future=3"),
    (ExpectedAttention, "sinks", 3, "expected-attention:buffer=4,window=9"),
    (AppendOnly, "score_layer", _window_is_admitted, "append-only:buffer=4,window=3,rate=0.5"),
    (AppendOnly, "rate", 0.2, "append-only:buffer=4,window=3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "broken", "policy"), MUTATIONS)
def test_twin_notices_a_changed_rule(owner, name, broken, policy, make_trace, monkeypatch):
    values = np.random.default_rng(3).normal(size=(2, 2, 60, 8))
    trace = make_trace(values=values, rope=ROPE)
    agree(trace, policy, 13)
    if not callable(broken):
        broken = property(lambda self, value=broken: value, lambda self, value: None)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        agree(trace, policy, 13)


@pytest.mark.parametrize(
    ("name", "broken", "policy"),
    [
        (
            "simulator.policies.scorers.window.average_pool",
            _edge_divided_by_what_is_there,
            "snapkv-paper",
        ),
        (
            "simulator.policies.scorers.window.average_pool",
            lambda values, kernel_size: values,
            "criticalkv",
        ),
    ],
)
def test_twin_notices_another_average(name, broken, policy, make_trace, monkeypatch):
    trace = make_trace(values=np.random.default_rng(3).normal(size=(2, 2, 60, 8)))
    policy = f"{policy}:buffer=4,window=4,pool=avg,kernel_size=5"
    agree(trace, policy, 13)
    monkeypatch.setattr(name, broken)
    with pytest.raises(AssertionError):
        agree(trace, policy, 13)


# ---- single rules -----------------------------------------------------------------------------------------


def test_averages_lose_at_both_ends():
    found = average_pool(np.ones(7, np.float32), 5)
    np.testing.assert_allclose(found, [0.6, 0.8, 1, 1, 1, 0.8, 0.6], rtol=1e-7)
    np.testing.assert_allclose(average_pool(np.ones(2, np.float32), 5), [0.4, 0.4], rtol=1e-7)


def test_preferred_entries_are_above_even_where_one_is_lost():
    scores = np.array([3e8, 1, 2], np.float32)
    assert preferred(scores, np.array([1]))[1] > np.float32(3e8)
    np.testing.assert_array_equal(preferred(scores, np.array([], int)), scores)


def test_append_only_never_evicts_what_it_admitted(rng):
    policy = parse_policy("append-only:window=3,rate=0.3")
    sequence = Sequence(policy, draw_arrays(rng, n_tokens=120), 20, 10)
    admitted, counts = [set(), set()], []
    for _ in range(25):
        sequence.compress()
        for head, kept in enumerate(sequence.positions):
            assert admitted[head] <= set(kept)
            admitted[head] |= set(kept[kept < sequence.n_tokens - 3])
        counts.append(len(sequence.positions[0]))
        assert counts[-1] == policy.scorer.quota(20, sequence.n_tokens)
        sequence.decode(4)
    assert counts == sorted(counts)
    # Exhausted: the window alone is new.
    before = list(sequence.positions)
    sequence.compress()
    for held, kept in zip(before, sequence.positions, strict=True):
        assert set(kept) == set(held[:17]) | set(range(sequence.n_tokens - 3, sequence.n_tokens))


def test_append_only_keeps_a_prompt_that_is_to_be_kept(make_trace):
    policy = "append-only:buffer=4,window=3,rate=0.1,prompt=keep"
    trace = make_trace(prompt_tokens=20)
    (outcome,) = Engine([Request(trace, parse_policy(policy), 26, keep_retained=True)]).run()
    assert outcome.retained
    for kept in outcome.retained:
        assert set(range(20)) <= set(kept.positions.tolist())
        assert len(kept.positions) <= 26


def test_heads_of_equal_budget_keep_the_same_tokens_under_tova(rng):
    sequence = Sequence(parse_policy("tova"), draw_arrays(rng, 3), 12, 30)
    for _ in range(4):
        sequence.compress()
        for kept in sequence.positions[1:]:
            np.testing.assert_array_equal(kept, sequence.positions[0])
        sequence.decode(5)


def test_mean_rotation_is_the_mean_of_rotations(rng):
    rope = read_rope(ROPE | {"partial_rotary_factor": 0.75}, 8)
    vector, positions = rng.normal(size=8), np.arange(5, 17)
    turned = rope.rotate(np.broadcast_to(vector, (12, 8)), positions)
    np.testing.assert_array_equal(turned[:, 6:], np.broadcast_to(vector[6:], (12, 2)))
    np.testing.assert_allclose(rope.mean_rotation(positions, 8) @ vector, turned.mean(axis=0), rtol=1e-12)


def test_scorers_need_no_more_than_they_look_at():
    assert SCORERS["lagkv"]().needs == {"values"}
    assert not SCORERS["lagkv"](score_source="keys").needs
    assert SCORERS["expected-attention"](use_values=False).needs == {"rope"}


def test_sinks_alone_are_all_there_is_to_expect(rng):
    queries, keys, values = (a.astype(np.float32) for a in draw_arrays(rng, 1, 2, 3))
    view = CacheView(
        keys=keys[0],
        values=values[0],
        queries=queries,
        positions=np.arange(3, dtype=np.int32),
        scale=0.4,
        n_tokens=3,
        prompt_tokens=3,
        layer=0,
        kv_head=0,
        seed=0,
        rope=read_rope(ROPE, 6),
    )
    (scores,) = checked_scores(SCORERS["expected-attention"](), LayerView.of([view]))
    assert np.isinf(scores).all()
    (scores,) = checked_scores(SCORERS["expected-attention"](sinks=2), LayerView.of([view]))
    assert np.isfinite(scores[2])
