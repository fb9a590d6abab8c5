"""The loop: pop, handle, schedule what follows. The only file that advances time.

Between two events decoding only appends, so the span is measured in one batched computation when the next
event of that layer is handled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np

from simulator.events import Event, EventQueue, Kind
from simulator.layer_replay import LayerReplay
from simulator.request import Outcome, Request


class Engine:
    """One clock over any number of requests.

    Layers that have an event of one kind at one time are handled in parallel: they share nothing, so the
    result does not depend on ``jobs``.

    Parameters
    ----------
    requests : sequence of Request
    jobs : int
        Threads.
    """

    def __init__(self, requests: Sequence[Request], jobs: int = 1) -> None:
        self._requests = requests
        self._jobs = jobs
        self._queue = EventQueue()
        self._valid: dict[tuple[int, int, Kind], Event] = {}

    def run(self) -> list[Outcome]:
        """Replay every request from arrival to completion."""
        for index, request in enumerate(self._requests):
            self._queue.push(request.arrival, Kind.ARRIVAL, index)
        pool = ThreadPoolExecutor(self._jobs) if self._jobs > 1 else None
        with pool or nullcontext():
            apply = pool.map if pool else map
            while self._queue:
                batch = self._queue.pop_simultaneous()
                self._handle(batch, apply)
        return [request.outcome() for request in self._requests]

    def _handle(self, batch: list[Event], apply: Callable[..., Iterable[None]]) -> None:
        # Looked up here and not kept: bound methods in an attribute would hold the engine, and every mapped
        # trace with it, until the next garbage collection.
        handlers = {
            Kind.ARRIVAL: self._arrive,
            Kind.REALLOCATION: self._reallocate,
            Kind.COMPRESSION: self._compress,
            Kind.COMPLETION: self._complete,
        }
        handlers[batch[0].kind](batch, apply)

    def _arrive(self, batch: list[Event], apply: Callable[..., Iterable[None]]) -> None:
        for event in batch:
            request = self._requests[event.request]
            list(apply(LayerReplay.prefill, request.layers))
            self._queue.push(request.completion, Kind.COMPLETION, event.request)
            if request.policy.divides_layers_again:
                self._queue.push(event.time, Kind.REALLOCATION, event.request)
            for layer in range(len(request.layers)):
                self._schedule(event.request, layer)

    def _reallocate(self, batch: list[Event], apply: Callable[..., Iterable[None]]) -> None:
        for event in batch:
            if event.layer < 0:
                self._reallocate_layers(event, apply)

        def handle(event: Event) -> None:
            request = self._requests[event.request]
            layer = request.layers[event.layer]
            layer.advance(request.tokens_at(event.time))
            layer.reallocate()

        list(apply(handle, [event for event in batch if event.layer >= 0 and self._is_valid(event)]))

    def _reallocate_layers(self, event: Event, apply: Callable[..., Iterable[None]]) -> None:
        request = self._requests[event.request]
        n_tokens = request.tokens_at(event.time)
        list(apply(lambda layer: layer.advance(n_tokens), request.layers))
        request.reallocate_layers()
        for layer in range(len(request.layers)):
            # A compression that is due now stays so; every other one depends on the new budgets.
            due = self._valid.get((event.request, layer, Kind.COMPRESSION))
            is_due = due is not None and due.time == event.time
            self._schedule(event.request, layer, n_tokens if is_due else None)
        delta = request.policy.layers.layer_delta
        if delta and event.time + delta < request.completion:
            self._queue.push(event.time + delta, Kind.REALLOCATION, event.request)

    def _compress(self, batch: list[Event], apply: Callable[..., Iterable[None]]) -> None:
        def handle(event: Event) -> None:
            request = self._requests[event.request]
            layer = request.layers[event.layer]
            layer.advance(request.tokens_at(event.time))
            layer.compress()

        batch = [event for event in batch if self._is_valid(event)]
        list(apply(handle, batch))
        for event in batch:
            self._schedule(event.request, event.layer)

    def _complete(self, batch: list[Event], apply: Callable[..., Iterable[None]]) -> None:
        for event in batch:
            request = self._requests[event.request]
            total_tokens = request.trace.total_tokens
            list(apply(lambda layer, n=total_tokens: layer.advance(n), request.layers))

    def _schedule(self, index: int, layer: int, n_tokens: int | None = None) -> None:
        """Schedule a layer's next compression, at ``n_tokens`` or when it is due, and forget any other."""
        request = self._requests[index]
        for kind in (Kind.REALLOCATION, Kind.COMPRESSION):
            self._valid.pop((index, layer, kind), None)
        if n_tokens is None:
            n_tokens = request.layers[layer].next_compression()
        if n_tokens is None or n_tokens >= request.trace.total_tokens:
            return  # at the last token completion comes first
        kinds = [Kind.COMPRESSION]
        if request.layers[layer].reallocation_due(n_tokens):
            kinds.insert(0, Kind.REALLOCATION)
        for kind in kinds:
            pushed = self._queue.push(request.time_of(n_tokens), kind, index, layer)
            self._valid[index, layer, kind] = pushed

    def _is_valid(self, event: Event) -> bool:
        """Say whether an event still stands: a change of layer budgets replaces those scheduled before."""
        return self._valid.get((event.request, event.layer, event.kind)) is event


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
