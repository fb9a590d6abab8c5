"""One clock over many requests: order, timelines and what holds for every policy."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from agreement import assert_equal_outcomes, make_wave, replayed
from cases import MODERATE, cases
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.compression import lend_unused
from simulator.engine.loop import Engine, memory_over_time
from simulator.engine.request import Request
from simulator.kernels.ledger import NEVER
from simulator.policies.language import parse_policy
from simulator.policies.parts import HeadAllocator, LayerAllocator, PolicyError
from traces.errors import UserError

POLICIES = [
    "fullkv",
    "streamingllm",
    "snapkv",
    "rkv",
    "pyramid-rkv",
    "reasonalloc:delta=8",
    "random",
    "random-prompt",
    "rkv:slot_order=score,no_match=column0",
    "snapkv+utility:delta=4,redistribute=true",
]


def request_for(trace, text, entries=14, **options):
    waves = {trace.model: make_wave(trace, range(1, trace.shape.n_layers + 1))}
    policy = parse_policy(text, buffer=5)
    return Request(trace, policy, entries, waves=waves, keep_retained=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_same_input_gives_the_same_bits_on_any_number_of_threads(policy, make_trace):
    trace = make_trace(n_layers=4)
    (first,) = Engine([request_for(trace, policy, seed=3)]).run()
    for jobs in (1, 3):
        (again,) = Engine([request_for(trace, policy, seed=3)], jobs=jobs).run()
        assert_equal_outcomes(first, again)


@pytest.mark.parametrize("jobs", [1, 3])
def test_requests_on_one_clock_equal_their_single_runs(make_trace, jobs):
    traces = [make_trace(n_tokens=n, prompt_tokens=p) for n, p in ((60, 20), (45, 30), (70, 5), (31, 30))]
    arrivals = (0, 7, 7, 25)

    def requests():
        pairs = zip(traces, POLICIES[2:6], arrivals, strict=True)
        return [request_for(trace, policy, arrival=arrival) for trace, policy, arrival in pairs]

    shared = requests()
    outcomes = Engine(shared, jobs=jobs).run()
    expected = np.zeros(
        max(r.arrival + r.trace.total_tokens - r.trace.prompt_tokens for r in shared), np.int64
    )
    for request, outcome in zip(requests(), outcomes, strict=True):
        (alone,) = Engine([request]).run()
        assert_equal_outcomes(alone, outcome)
        expected[request.arrival : request.arrival + len(alone.held)] += alone.held
    np.testing.assert_array_equal(memory_over_time(shared, outcomes), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_evicted_while_every_budget_holds_the_length(policy, make_trace):
    trace = make_trace()
    # No allocator gives a layer or head less than a twentieth of the mean.
    factor = 20 if "+" in policy or policy.startswith(("pyramid", "reasonalloc")) else 1
    (outcome,) = Engine([request_for(trace, policy, factor * trace.total_tokens)]).run()
    assert (outcome.mass == 1).all()
    assert (outcome.evicted_at == NEVER).all()
    assert outcome.n_evicted == 0
    assert outcome.held.tolist() == [4 * n for n in range(21, 61)]


def test_one_entry_less_than_the_length_evicts(make_trace):
    trace = make_trace()
    (outcome,) = Engine([request_for(trace, "snapkv:trigger=every-n,interval=1", 58)]).run()
    assert outcome.n_evicted == 4  # at 59 tokens, once per layer and head; at 60 the run is over
    assert set(np.unique(outcome.evicted_at)) == {59, NEVER}


@pytest.mark.slow
@given(cases(dynamic=True), st.integers(0, 4))
@MODERATE
def test_protected_entries_survive_and_counts_are_exact(shared_folder, case, seed):
    trace = case.write(shared_folder)
    outcome, _ = replayed(trace, case.policy, case.entries, demand=case.demand, seed=seed)
    policy = parse_policy(case.policy)
    layer_totals = {}
    for kept in outcome.retained:
        positions = kept.positions.tolist()
        assert len(set(positions)) == len(positions)
        assert set(range(min(policy.scorer.sinks, kept.n_tokens))) <= set(positions)
        assert set(range(max(kept.n_tokens - policy.scorer.recent, 0), kept.n_tokens)) <= set(positions)
        assert max(positions, default=0) < kept.n_tokens < trace.total_tokens
        if policy.layers.name == "uniform" and policy.heads.name == "uniform":
            assert len(positions) == min(case.entries, kept.n_tokens)
        if policy.scorer.slot_order == "chronological":
            assert positions == sorted(positions)
        key = kept.layer, kept.n_tokens
        layer_totals[key] = layer_totals.get(key, 0) + len(positions)
        if policy.trigger.prompt == "keep":
            assert set(range(min(trace.prompt_tokens, kept.n_tokens))) <= set(positions)
    for division in outcome.divisions:
        assert division.lengths.sum() == layer_totals[division.layer, division.n_tokens]
        assert (division.lengths <= division.budgets).all()
    waves = {trace.model: make_wave(trace, case.demand)}
    layers = Request(trace, policy, case.entries, waves=waves).layers
    totals = [layer.compressor.total for layer in layers]
    if policy.layers.exact:
        assert sum(totals) == len(layers) * trace.shape.n_kv_heads * case.entries
    if not policy.layers.dynamic:
        assert all(n_entries <= totals[layer] for (layer, _), n_entries in layer_totals.items())
    assert (outcome.mass <= 1 + 1e-6).all()
    assert (outcome.mass >= 0).all()


@pytest.mark.parametrize(
    "policy", ["streamingllm", "snapkv", "rkv", "snapkv:group_reduce=mean_weights", "rkv+pyramid"]
)
def test_permuting_heads_permutes_results(policy, make_trace, rng):
    queries, keys = rng.normal(size=(2, 3, 2, 50, 8)), rng.normal(size=(2, 3, 50, 8))
    order = [2, 0, 1]

    def outcome_of(queries, keys):
        trace = make_trace(arrays=(queries.reshape(2, 6, 50, 8), keys))
        (outcome,) = Engine([request_for(trace, policy)]).run()
        return outcome

    plain = outcome_of(queries, keys)
    permuted = outcome_of(queries[:, order][:, :, ::-1], keys[:, order])
    np.testing.assert_array_equal(permuted.evicted_at, plain.evicted_at[:, order])
    by_head = plain.mass.reshape(2, 3, 2, -1)
    np.testing.assert_allclose(permuted.mass, by_head[:, order][:, :, ::-1].reshape(2, 6, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("prompt_tokens", "entries", "before_compression"),
    [
        # Timelines of the published R-KV code: entries held at positions that trigger, then the budget.
        (200, 128, {256: 185, 384: 256, 512: 256}),
        (100, 128, {128: 129, 256: 256, 384: 256}),
        (256, 500, {512: 513, 640: 628}),
    ],
)
def test_every_n_follows_the_published_timeline(prompt_tokens, entries, before_compression, make_trace):
    trace = make_trace(1, 1, 1, n_tokens=700, head_dim=4, prompt_tokens=prompt_tokens)
    request = Request(trace, parse_policy("streamingllm:trigger=every-n,offset=1"), entries)
    (outcome,) = Engine([request]).run()
    for position, held in before_compression.items():
        step = position - prompt_tokens
        assert outcome.held[step : step + 2].tolist() == [held, entries + 1]


def test_buffer_full_timeline(make_trace):
    trace = make_trace(1, 2, 1, n_tokens=64, prompt_tokens=30)
    waiting = Request(trace, parse_policy("random:buffer=8,prompt=wait"), 12, keep_retained=True)
    cutting = Request(trace, parse_policy("random:buffer=8"), 12, keep_retained=True)
    waited, cut = Engine([waiting, cutting]).run()
    # The prompt overfills the cache: cut at once, or after one more token. Attention comes first.
    assert sorted({kept.n_tokens for kept in cut.retained}) == [30, 38, 46, 54, 62]
    assert sorted({kept.n_tokens for kept in waited.retained}) == [31, 39, 47, 55, 63]
    assert cut.held[:9].tolist() == [2 * n for n in (13, 14, 15, 16, 17, 18, 19, 20, 13)]
    assert waited.held[:2].tolist() == [62, 26]
    assert cut.held.max() == 2 * (12 + 8)


def test_completion_comes_before_a_compression_at_the_same_time(make_trace):
    # Compressions fall on 30, 40, 50 and 60 tokens; the last of these completes the run.
    trace = make_trace(n_tokens=60, prompt_tokens=30)
    (outcome,) = Engine([request_for(trace, "random:buffer=10")]).run()
    assert {kept.n_tokens for kept in outcome.retained} == {30, 40, 50}
    assert outcome.evicted_at[outcome.evicted_at != NEVER].max() == 50


def test_reallocation_waits_for_delta_and_a_compression(make_trace):
    trace = make_trace(n_layers=1, n_tokens=80, prompt_tokens=30)
    budgets = replayed(trace, "rkv+utility:buffer=4,delta=10", 14)[1][0]
    _, often = replayed(trace, "rkv+utility:buffer=4,delta=1", 14)
    n_compressions = len({kept.n_tokens for kept in replayed(trace, "rkv:buffer=4", 14)[0].retained})
    # At 30 and then every third compression: 12 tokens is the first multiple of 4 to reach 10.
    assert n_compressions == 13
    assert len(budgets) == 5
    assert len(often[0]) == n_compressions


lengths = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8)


@pytest.mark.slow
@given(lengths)
@MODERATE
def test_lent_budget_is_used_where_it_can_be(heads):
    budgets, held = np.array(heads, np.int64).T
    allowed = lend_unused(budgets, held)
    assert allowed.sum() == min(budgets.sum(), held.sum())
    assert (allowed <= held).all()
    assert (allowed >= np.minimum(budgets, held)).all()


@pytest.mark.parametrize("policy", ["rkv+utility", "snapkv+wave+utility:delta=4", "random+utility:delta=3"])
def test_redistribution_leaves_no_budget_unused(policy, make_trace):
    trace = make_trace(n_layers=2, n_kv_heads=4, n_tokens=80, prompt_tokens=12)
    separator = "," if ":" in policy else ":"
    request = request_for(trace, f"{policy}{separator}redistribute=true", 15)
    plain = request_for(trace, policy, 15)
    lending, hoarding = Engine([request, plain]).run()
    totals = {}
    for kept in lending.retained:
        key = kept.layer, kept.compression, kept.n_tokens
        totals[key] = totals.get(key, 0) + len(kept.positions)
    assert totals
    for (layer, _, n_tokens), n_entries in totals.items():
        assert n_entries == min(request.layers[layer].compressor.total, 4 * n_tokens)
    assert lending.held.mean() >= hoarding.held.mean()


class Greedy(LayerAllocator):
    name = "greedy"

    def allocate(self, request):
        return np.full(request.n_layers, request.entries + 1), False


class Lopsided(HeadAllocator):
    name = "lopsided"
    delta = 1

    def allocate(self, request):
        return np.full(request.n_heads, request.total), False


def test_allocators_that_miss_the_total_are_refused(make_trace):
    trace, policy = make_trace(), parse_policy("random:buffer=4")
    with pytest.raises(PolicyError, match=r"'greedy' gave 30 .* exactly 28"):
        Request(trace, replace(policy, layers=Greedy()), 14)
    request = Request(trace, replace(policy, heads=Lopsided()), 14)
    with pytest.raises(PolicyError, match=r"'lopsided' gave 56 .* exactly 28"):
        Engine([request]).run()


def test_a_request_cannot_arrive_before_the_clock_starts(make_trace):
    with pytest.raises(UserError, match="arrival is -1"):
        Request(make_trace(), parse_policy("rkv"), 12, arrival=-1)


def test_a_finished_engine_lets_go_of_its_requests(make_trace):
    gc.disable()
    try:
        engine = Engine([Request(make_trace(), parse_policy("rkv:buffer=4"), 14)])
        engine.run()
        layer = weakref.ref(engine._requests[0].layers[0])
        del engine
        assert layer() is None
    finally:
        gc.enable()
