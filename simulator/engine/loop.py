"""The loop: pop, handle, schedule what follows.

Between two events decoding only appends, so the span is measured in one batched computation when the next
event of that layer is handled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from simulator.engine.events import Event, EventQueue, Kind
from simulator.engine.layer import LayerReplay
from simulator.engine.request import Outcome, Request

# Calls a function on each of many: one after the other, or side by side.
_Apply = Callable[..., Iterable[Any]]
# Python's own 5 ms are longer than most of what a thread computes at a small budget.
_SWITCH_SECONDS = 2e-4


class Engine:
    """One clock over any number of requests.

    Layers whose budgets are settled beforehand share nothing: each is a lane that runs to its completion by
    itself, so that only those at work hold keys. Layers whose budgets move together are one lane. Results
    do not depend on ``jobs``.

    Parameters
    ----------
    requests : sequence of Request
    jobs : int
        Threads.
    """

    def __init__(self, requests: Sequence[Request], jobs: int = 1) -> None:
        self._requests = requests
        self._jobs = jobs

    def run(self) -> list[Outcome]:
        """Replay every request from arrival to completion."""
        alone: list[_Lane] = []
        together: list[_Lane] = []
        for request in self._requests:
            layers = range(len(request.layers))
            if request.policy.divides_layers_again:
                together.append(_Lane(request, layers))
            else:
                alone += [_Lane(request, [layer]) for layer in layers]
        pool = ThreadPoolExecutor(self._jobs) if self._jobs > 1 else None
        with pool or nullcontext(), _quick_switches() if pool else nullcontext():
            apply = pool.map if pool else map
            try:
                list(apply(_Lane.run, alone))
                for lane in together:
                    lane.run(apply)
            except BaseException:
                for lane in alone:
                    lane.stop()
                raise
        return [request.outcome() for request in self._requests]


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Hand the interpreter over soon: threads need it for moments between products, and wait for it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class _Lane:
    """Layers of one request that wait for each other, and the events of theirs that are to come."""

    def __init__(self, request: Request, layers: Sequence[int]) -> None:
        self._request = request
        self._layers = layers
        self._queue = EventQueue()
        self._valid: dict[tuple[int, Kind], Event] = {}
        self._is_stopped = False

    def run(self, apply: _Apply = map) -> None:
        """Handle all events from arrival to completion; layers of one lane by ``apply``, side by side."""
        handlers = {
            Kind.ARRIVAL: self._arrive,
            Kind.REALLOCATION: self._reallocate,
            Kind.COMPRESSION: self._compress,
            Kind.COMPLETION: self._complete,
        }
        self._queue.push(self._request.arrival, Kind.ARRIVAL)
        while self._queue and not self._is_stopped:
            batch = self._queue.pop_simultaneous()
            handlers[batch[0].kind](batch, apply)

    def stop(self) -> None:
        """Let the event at hand be the last."""
        self._is_stopped = True

    def _arrive(self, batch: list[Event], apply: _Apply) -> None:
        request = self._request
        list(apply(LayerReplay.prefill, self._replays()))
        self._queue.push(request.completion, Kind.COMPLETION)
        if request.policy.divides_layers_again:
            self._queue.push(batch[0].time, Kind.REALLOCATION)
        for layer in self._layers:
            self._schedule(layer)

    def _reallocate(self, batch: list[Event], apply: _Apply) -> None:
        for event in batch:
            if event.layer < 0:
                self._reallocate_layers(event, apply)

        def handle(event: Event) -> None:
            layer = self._request.layers[event.layer]
            layer.advance(self._request.tokens_at(event.time))
            layer.reallocate()

        list(apply(handle, [event for event in batch if event.layer >= 0 and self._is_valid(event)]))

    def _reallocate_layers(self, event: Event, apply: _Apply) -> None:
        request = self._request
        n_tokens = request.tokens_at(event.time)
        list(apply(lambda layer: layer.advance(n_tokens), self._replays()))
        request.reallocate_layers()
        for layer in self._layers:
            # A compression that is due now stays so; every other one depends on the new budgets.
            due = self._valid.get((layer, Kind.COMPRESSION))
            is_due = due is not None and due.time == event.time
            self._schedule(layer, n_tokens if is_due else None)
        delta = request.policy.layers.layer_delta
        if delta and event.time + delta < request.completion:
            self._queue.push(event.time + delta, Kind.REALLOCATION)

    def _compress(self, batch: list[Event], apply: _Apply) -> None:
        def handle(event: Event) -> None:
            layer = self._request.layers[event.layer]
            layer.advance(self._request.tokens_at(event.time))
            layer.compress()

        batch = [event for event in batch if self._is_valid(event)]
        list(apply(handle, batch))
        for event in batch:
            self._schedule(event.layer)

    def _complete(self, batch: list[Event], apply: _Apply) -> None:
        total_tokens = self._request.trace.total_tokens

        def handle(layer: LayerReplay) -> None:
            layer.advance(total_tokens)
            layer.complete()

        list(apply(handle, self._replays()))

    def _schedule(self, layer: int, n_tokens: int | None = None) -> None:
        """Schedule a layer's next compression, at ``n_tokens`` or when it is due, and forget any other."""
        request = self._request
        for kind in (Kind.REALLOCATION, Kind.COMPRESSION):
            self._valid.pop((layer, kind), None)
        if n_tokens is None:
            n_tokens = request.layers[layer].next_compression()
        if n_tokens is None or n_tokens >= request.trace.total_tokens:
            return  # at the last token completion comes first
        kinds = [Kind.COMPRESSION]
        if request.layers[layer].reallocation_due(n_tokens):
            kinds.insert(0, Kind.REALLOCATION)
        for kind in kinds:
            self._valid[layer, kind] = self._queue.push(request.time_of(n_tokens), kind, layer)

    def _is_valid(self, event: Event) -> bool:
        """Say whether an event still stands: a change of layer budgets replaces those scheduled before."""
        return self._valid.get((event.layer, event.kind)) is event

    def _replays(self) -> list[LayerReplay]:
        return [self._request.layers[layer] for layer in self._layers]


def memory_over_time(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> np.ndarray:
    """Add up the entries that all requests hold at every tick of the shared clock.

    Returns
    -------
    int64 (n_ticks,), from tick 0 to the last completion. A request holds memory from its arrival on.
    """
    total = np.zeros(max(request.completion for request in requests), np.int64)
    for request, outcome in zip(requests, outcomes, strict=True):
        total[request.arrival : request.completion] += outcome.held
    return total
