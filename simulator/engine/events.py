"""Event kinds, their order at equal times, and the queue. No attention in here."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import IntEnum
from itertools import count


class Kind(IntEnum):
    """What can happen, in the order of simultaneous events: memory is freed before it is taken."""

    COMPLETION = 0
    REALLOCATION = 1
    COMPRESSION = 2
    ARRIVAL = 3


@dataclass(frozen=True, slots=True)
class Event:
    """Something that changes who is retained or who holds memory.

    Attributes
    ----------
    time : int
        Decode steps on the shared clock.
    kind : Kind
    serial : int
        Order of scheduling; settles events of equal time and kind.
    layer : int
        Whom it concerns; -1 for the whole request.
    """

    time: int
    kind: Kind
    serial: int
    layer: int = -1


class EventQueue:
    """Events in the order (time, kind, serial); the serial belongs to this queue."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Event]] = []
        self._serial = count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, time: int, kind: Kind, layer: int = -1) -> Event:
        """Schedule an event and give it."""
        event = Event(time, kind, next(self._serial), layer)
        heapq.heappush(self._heap, (time, kind, event.serial, event))
        return event

    def pop_simultaneous(self) -> list[Event]:
        """Take every event that shares the earliest time and its first kind, in serial order.

        Raises
        ------
        IndexError
            If the queue is empty.
        """
        batch = [heapq.heappop(self._heap)[3]]
        first = batch[0]
        while self._heap and self._heap[0][:2] == (first.time, first.kind):
            batch.append(heapq.heappop(self._heap)[3])
        return batch
