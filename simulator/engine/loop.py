"""The loop: pop, handle, schedule what follows.

Between two events decoding only appends, so the span is measured in one batched computation when the next
event of that layer is handled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import numpy as np

from simulator.engine.events import Event, EventQueue, Kind
from simulator.engine.layer import LayerReplay
from simulator.engine.request import Outcome, Request

# Python's own 5 ms are longer than most of what a thread computes at a small budget.
_SWITCH_SECONDS = 2e-4


class Engine:
    """One clock over any number of requests, and one queue of all that happens to them.

    Events of all requests are handled in the order of time, simultaneous ones in the order of ``Kind``.
    Layers whose budgets are settled beforehand share nothing: the clock need not stop at their compressions.
    Each of them is replayed apart, whole and by itself, at some moment between its request's arrival and
    completion, so that only layers at work hold keys and threads do not wait for each other. Results do not
    depend on ``jobs``.

    Parameters
    ----------
    requests : sequence of Request
        Each for one engine only.
    jobs : int
        Threads.

    Notes
    -----
    A new kind of event is a member of ``Kind``, at its place in the order, and a handler in ``run``. What
    requests share, such as a pool of memory, belongs to the engine: every handler can see it, and only
    requests that it does not concern may be replayed apart (``_is_apart``). Only a ``Request`` knows how its
    tokens lie on the clock.
    """

    def __init__(self, requests: Sequence[Request], jobs: int = 1) -> None:
        self._requests = requests
        self._jobs = jobs
        self._queue = EventQueue()
        # By request and layer; a change of layer budgets replaces them.
        self._standing: dict[tuple[int, int], list[Event]] = {}
        # By request: layers that are replayed apart, under way or still to do.
        self._apart: dict[int, Iterable[None]] = {}
        self._is_stopped = False
        # Calls a function on each of many: one after the other, or side by side.
        self._apply: Callable[..., Iterable[Any]] = map
        for number, request in enumerate(requests):
            self._queue.push(request.arrival, Kind.ARRIVAL, number)

    def run(self) -> list[Outcome]:
        """Replay every request from arrival to completion."""
        handlers = {
            Kind.COMPLETION: self._complete,
            Kind.LAYER_BUDGETS: self._reallocate_layers,
            Kind.HEAD_BUDGETS: self._reallocate_heads,
            Kind.COMPRESSION: self._compress,
            Kind.ARRIVAL: self._arrive,
        }
        pool = ThreadPoolExecutor(self._jobs) if self._jobs > 1 else None
        with pool or nullcontext(), _quick_switches() if pool else nullcontext():
            self._apply = pool.map if pool else map
            try:
                while self._queue:
                    batch = self._queue.pop_simultaneous()
                    handlers[batch[0].kind](batch)
            except BaseException:
                self._is_stopped = True
                raise
        return [request.outcome() for request in self._requests]

    def _is_apart(self, request: Request) -> bool:
        """Say whether a request's layers are replayed apart: nothing else sees what they hold and when."""
        return not request.policy.divides_layers_again

    def _arrive(self, batch: list[Event]) -> None:
        for event in batch:
            number, request = event.request, self._requests[event.request]
            self._queue.push(request.completion, Kind.COMPLETION, number)
            if self._is_apart(request):
                # With threads it begins now, without them when its request completes.
                self._apart[number] = self._apply(self._replay_apart, request.layers)
                continue
            list(self._apply(LayerReplay.prefill, request.layers))
            if request.policy.divides_layers_again:
                self._schedule_layers(number, event.time)
            for layer in range(len(request.layers)):
                self._schedule(number, layer)

    def _replay_apart(self, layer: LayerReplay) -> None:
        """Take a layer from its prompt to its last token, if the engine does not stop before."""
        if not self._is_stopped:
            layer.prefill()
        while not self._is_stopped:
            due = _next_compression(layer)
            if due is None:
                return _complete_layer(layer)
            layer.advance(due)
            layer.compress()

    def _reallocate_layers(self, batch: list[Event]) -> None:
        for event in batch:
            number, request = event.request, self._requests[event.request]
            n_tokens = request.tokens_at(event.time)
            list(self._apply(LayerReplay.advance, request.layers, repeat(n_tokens)))
            request.reallocate_layers()
            for layer in range(len(request.layers)):
                # A compression that is due now stays so; every other one depends on the new budgets.
                is_due = any(own.time == event.time for own in self._standing[number, layer])
                self._schedule(number, layer, n_tokens if is_due else None)
            if delta := request.policy.layers.layer_delta:
                self._schedule_layers(number, event.time + delta)

    def _reallocate_heads(self, batch: list[Event]) -> None:
        list(self._apply(lambda event: self._advanced(event).reallocate(), self._still_standing(batch)))

    def _compress(self, batch: list[Event]) -> None:
        batch = self._still_standing(batch)
        list(self._apply(lambda event: self._advanced(event).compress(), batch))
        for event in batch:
            self._schedule(event.request, event.layer)

    def _complete(self, batch: list[Event]) -> None:
        for event in batch:
            left = self._apart.pop(event.request, None)
            layers = self._requests[event.request].layers
            list(self._apply(_complete_layer, layers) if left is None else left)

    def _advanced(self, event: Event) -> LayerReplay:
        """Give the layer that an event concerns, once it has decoded up to it."""
        request = self._requests[event.request]
        layer = request.layers[event.layer]
        layer.advance(request.tokens_at(event.time))
        return layer

    def _schedule_layers(self, number: int, time: int) -> None:
        """Schedule a division of the budget over layers, if the request has not completed by then."""
        if time < self._requests[number].completion:
            self._queue.push(time, Kind.LAYER_BUDGETS, number)

    def _schedule(self, number: int, layer: int, n_tokens: int | None = None) -> None:
        """Schedule a layer's next compression, at ``n_tokens`` or when it is due, in place of any other."""
        request, own = self._requests[number], self._requests[number].layers[layer]
        self._standing[number, layer] = standing = []
        n_tokens = _next_compression(own) if n_tokens is None else n_tokens
        if n_tokens is None:
            return
        kinds = [Kind.HEAD_BUDGETS] if own.compressor.reallocation_due(n_tokens) else []
        for kind in (*kinds, Kind.COMPRESSION):
            standing.append(self._queue.push(request.time_of(n_tokens), kind, number, layer))

    def _still_standing(self, batch: list[Event]) -> list[Event]:
        return [event for event in batch if event in self._standing[event.request, event.layer]]


def _next_compression(layer: LayerReplay) -> int | None:
    """Give the token count of a layer's next compression; at the last token completion comes first."""
    due = layer.next_compression()
    return due if due is not None and due < layer.trace.total_tokens else None


def _complete_layer(layer: LayerReplay) -> None:
    layer.advance(layer.trace.total_tokens)
    layer.complete()


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Hand the interpreter over soon: threads need it for moments between products, and wait for it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


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
