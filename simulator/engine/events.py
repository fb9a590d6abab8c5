"""Event kinds, their order at equal times, and the queue. No attention in here."""

from __future__ import annotations

import heapq
from enum import IntEnum
from itertools import count
from typing import NamedTuple


class Kind(IntEnum):
    """What can happen, in the order of simultaneous events: memory is freed before it is taken."""

    COMPLETION = 0
    LAYER_BUDGETS = 1
    HEAD_BUDGETS = 2
    COMPRESSION = 3
    ARRIVAL = 4


class Event(NamedTuple):
    """Something that changes which entries are retained or how much memory is held.

    Attributes
    ----------
    time : int
        Decode steps on the shared clock.
    kind : Kind
    serial : int
        Order of scheduling; settles events of equal time and kind.
    request : int
        Number of the request that it concerns.
    layer : int
        Its layer; -1 for the whole request.
    """

    time: int
    kind: Kind
    serial: int
    request: int
    layer: int = -1


class EventQueue:
    """Events of all requests in the order (time, kind, serial); the serial belongs to this queue."""

    def __init__(self) -> None:
        self._heap: list[Event] = []
        self._serial = count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, time: int, kind: Kind, request: int, layer: int = -1) -> Event:
        """Schedule an event and give it."""
        event = Event(time, kind, next(self._serial), request, layer)
        heapq.heappush(self._heap, event)
        return event

    def pop_simultaneous(self) -> list[Event]:
        """Take every event that shares the earliest time and its first kind, in serial order.

        Raises
        ------
        IndexError
            If the queue is empty.
        """
        batch = [heapq.heappop(self._heap)]
        while self._heap and self._heap[0][:2] == batch[0][:2]:
            batch.append(heapq.heappop(self._heap))
        return batch
