"""The order of events is written down, and settled by nothing else."""

from __future__ import annotations

import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.events import EventQueue, Kind

pushes = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(list(Kind))), max_size=30)


def test_kinds_at_equal_time_have_an_order():
    queue = EventQueue()
    for number, kind in enumerate(reversed(Kind)):
        queue.push(3, kind, number)
    order = [queue.pop_simultaneous()[0].kind.name for _ in Kind]
    assert order == ["COMPLETION", "LAYER_BUDGETS", "HEAD_BUDGETS", "COMPRESSION", "ARRIVAL"]
    assert not queue


@given(pushes)
@MODERATE
def test_events_come_by_time_kind_and_order_of_scheduling(pushed):
    queue = EventQueue()
    for serial, (time, kind) in enumerate(pushed):
        queue.push(time, kind, request=-serial, layer=serial)
    batches = []
    while queue:
        batches.append(queue.pop_simultaneous())
    popped = [(event.time, event.kind, event.layer) for batch in batches for event in batch]
    assert popped == sorted((time, kind, serial) for serial, (time, kind) in enumerate(pushed))
    heads = [(batch[0].time, batch[0].kind) for batch in batches]
    assert len(set(heads)) == len(heads)  # a batch holds all events of its time and kind
    assert all(
        (event.time, event.kind) == head
        for batch, head in zip(batches, heads, strict=True)
        for event in batch
    )


def test_serials_belong_to_their_queue():
    for _ in range(2):
        queue = EventQueue()
        queue.push(0, Kind.ARRIVAL, 5)
        (event,) = queue.pop_simultaneous()
        assert (event.serial, event.request, event.layer) == (0, 5, -1)


def test_empty_queue_has_nothing_to_pop():
    with pytest.raises(IndexError):
        EventQueue().pop_simultaneous()
