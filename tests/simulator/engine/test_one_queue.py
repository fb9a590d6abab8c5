"""Events of all requests meet in one queue, and no request sees another."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from itertools import pairwise
from unittest.mock import patch

import pytest
from agreement import assert_equal_outcomes, make_wave
from cases import MODERATE, cases
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.events import Kind
from simulator.engine.layer import LayerReplay
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy

# Layers wait for each other, so that all of their events are on the clock.
MOVING = "rkv+wave-dynamic+utility:window=4,buffer=5,layer_delta=10,delta=7,demand_window=4"
SETTLED = "rkv+utility:window=4,buffer=5,delta=7"


class ClockOnly(Engine):
    """Stops at the compressions of all layers, as if they shared something."""

    def _is_apart(self, request):
        return False


def request_for(trace, text, entries=14, **options):
    waves = {trace.model: make_wave(trace, range(1, trace.shape.n_layers + 1))}
    return Request(trace, parse_policy(text), entries, waves=waves, keep_retained=True, **options)


def run_watched(engine, requests):
    """Run requests; give what was done in which order, as (tick, kind, request, layer)."""
    log = []
    number_of = {id(layer): (i, n) for i, own in enumerate(requests) for n, layer in enumerate(own.layers)}

    def note(kind, layer):
        number, index = number_of[id(layer)]
        log.append((requests[number].time_of(layer._n_tokens), kind, number, index))

    def watch(name, kind):
        do = getattr(LayerReplay, name)

        def watched(layer, *arguments):
            do(layer, *arguments)
            note(kind, layer)

        return patch.object(LayerReplay, name, watched)

    reallocate_layers = Request.reallocate_layers

    def watched_layers(request):
        reallocate_layers(request)
        note(Kind.LAYER_BUDGETS, request.layers[0])

    with ExitStack() as stack:
        stack.enter_context(patch.object(Request, "reallocate_layers", watched_layers))
        for name, kind in {
            "prefill": Kind.ARRIVAL,
            "reallocate": Kind.HEAD_BUDGETS,
            "compress": Kind.COMPRESSION,
            "complete": Kind.COMPLETION,
        }.items():
            stack.enter_context(watch(name, kind))
        outcomes = engine(requests).run()
    return outcomes, log


def in_written_order(log):
    """Whether what happened at each tick has the order of kinds; a prompt is cut after it has arrived."""
    arrived, keys = set(), []
    ticks = {number: tick for tick, kind, number, _ in log if kind is Kind.ARRIVAL}
    for tick, kind, number, _ in log:
        arrived |= {number} if kind is Kind.ARRIVAL else set()
        assert number in arrived
        # An arrival schedules more at its own tick: a second round in the same order.
        keys.append((tick, tick == ticks[number] and kind is not Kind.ARRIVAL, kind))
    return all(one <= other for one, other in pairwise(keys))


@pytest.mark.parametrize(("engine", "policy"), [(Engine, MOVING), (ClockOnly, SETTLED)])
def test_simultaneous_events_of_different_requests_have_the_written_order(engine, policy, make_trace):
    trace = make_trace(n_layers=3, n_tokens=60, prompt_tokens=20)
    # Listed against the order of arrival; some arrive as others are compressed, divided again or complete.
    arrivals = (40, 10, 5, 5, 0)
    requests = [request_for(trace, policy, arrival=arrival) for arrival in arrivals]
    outcomes, log = run_watched(engine, requests)
    assert in_written_order(log)
    by_tick = defaultdict(set)
    for tick, kind, number, _ in log:
        by_tick[tick].add((kind, number))
    # Such ticks there are: the last completes as the first arrives, and kinds of different requests meet.
    assert {(Kind.COMPLETION, 4), (Kind.ARRIVAL, 0), (Kind.COMPRESSION, 1)} <= by_tick[40]
    assert any(len({number for _, number in events}) > 2 for events in by_tick.values())
    if policy == MOVING:
        assert {(Kind.LAYER_BUDGETS, 4), (Kind.ARRIVAL, 1), (Kind.COMPRESSION, 4)} <= by_tick[10]
    (alone,) = Engine([request_for(trace, policy)]).run()
    for outcome in outcomes:
        assert_equal_outcomes(alone, outcome)


@given(
    st.lists(st.tuples(cases(dynamic=True), st.integers(0, 60), st.integers(0, 3)), min_size=2, max_size=3),
    st.sampled_from([Engine, ClockOnly]),
    st.sampled_from([1, 3]),
)
@MODERATE
def test_requests_on_one_clock_equal_each_alone(shared_folder, drawn, engine, jobs):
    def requests():
        return [
            Request(
                trace,
                parse_policy(case.policy),
                case.entries,
                waves={trace.model: make_wave(trace, case.demand)},
                arrival=arrival,
                seed=seed,
                keep_retained=True,
            )
            for trace, (case, arrival, seed) in zip(traces, drawn, strict=True)
        ]

    traces = []
    for number, (case, _, _) in enumerate(drawn):
        folder = shared_folder / str(number)
        folder.mkdir(exist_ok=True)
        traces.append(case.write(folder))
    together = engine(requests(), jobs).run()
    for request, outcome in zip(requests(), together, strict=True):
        (alone,) = Engine([request]).run()
        assert_equal_outcomes(alone, outcome)


@pytest.mark.parametrize("policy", [MOVING, SETTLED])
def test_a_request_without_a_decode_step_completes_as_it_arrives(policy, make_trace):
    trace = make_trace(n_tokens=20, prompt_tokens=20)
    (outcome,) = Engine([request_for(trace, policy)]).run()
    assert outcome.n_evicted == 0
    assert outcome.held.shape == (0,)


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_engine_that_fails_leaves_what_it_has_not_begun(jobs, make_trace):
    trace = make_trace(n_layers=4)
    requests = [request_for(trace, SETTLED, arrival=arrival) for arrival in (0, 0, 3)]
    engine, begun = Engine(requests, jobs), []

    def failing(layer):
        begun.append(layer)
        if layer is requests[0].layers[0]:
            raise RuntimeError("no more")
        while not engine._is_stopped:
            time.sleep(0.001)

    with patch.object(LayerReplay, "prefill", failing), pytest.raises(RuntimeError, match="no more"):
        engine.run()
    # The one that failed, and those that threads had in hand; none of them goes on to decode.
    assert len(begun) <= 1 + (jobs if jobs > 1 else 0)
    assert not any(layer.held.any() for own in requests for layer in own.layers)
