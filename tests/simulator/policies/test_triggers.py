"""When a layer compresses: at every token, or where a segment ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from simulator.policies.triggers.buffer_full import BufferFull
from simulator.policies.triggers.every_n import EveryN
from simulator.policies.triggers.per_step import PerStep
from simulator.policies.triggers.segment import Segment
from traces.errors import MissingDataError, UserError

TEXT = {3: "a", 5: ".\n", 7: "\n\n", 9: "b"}


def compressions(trace, text, entries=12):
    (outcome,) = Engine([Request(trace, parse_policy(text), entries)]).run()
    return sorted({division.n_tokens for division in outcome.divisions}), outcome


@pytest.fixture
def told_trace(make_trace):
    """Write a trace of 60 tokens, 20 of them prompt, whose newlines are at 10, 25, 26, 45 and 59."""
    token_ids = np.full(60, 3)
    token_ids[[10, 25, 45]], token_ids[[26, 59]] = 5, 7
    return make_trace(token_ids=token_ids, vocabulary=TEXT)


def test_segment_follows_the_token_that_ends_it(told_trace):
    # The prompt is cut at 20 tokens; a newline at position 25 is the 26th token. The last token completes.
    found, outcome = compressions(told_trace, "random:trigger=segment")
    assert found == [20, 26, 27, 46]
    # Its step still attends to all.
    assert outcome.held[[5, 6, 7]].tolist() == [4 * n for n in (18, 13, 13)]
    assert compressions(told_trace, "random:trigger=segment,prompt=wait")[0] == [26, 27, 46]
    assert compressions(told_trace, "random:trigger=segment,segment=7/99")[0] == [20, 27]
    # With room for 30 tokens the newlines up to there change nothing.
    assert compressions(told_trace, "random:trigger=segment", 30)[0] == [46]


def test_segment_is_resolved_to_ids():
    trigger = Segment(prompt="wait")
    resolved = trigger.resolved(TEXT)
    assert resolved == Segment("5/7", "wait")
    assert resolved.resolved({}) is resolved
    assert resolved.fires_on(np.array([3, 5, 7, 9, 5])).tolist() == [False, True, True, False, True]
    silent = trigger.resolved({3: "a"})
    assert not silent.fires_on(np.array([3, 4])).any()
    assert Segment("0").fires_on(np.array([0, 1])).tolist() == [True, False]


def test_segment_needs_the_text_of_tokens(make_trace):
    with pytest.raises(MissingDataError, match="does not hold the text of its tokens") as refusal:
        Request(make_trace(), parse_policy("random:trigger=segment"), 12)
    assert refusal.value.exit_code == 4
    with pytest.raises(MissingDataError, match="ids are not known"):
        Segment().fires_on(np.array([1]))


@pytest.mark.parametrize("segment", ["5/", "a/b", "paragraph", "-1/2", "1.5/2"])
def test_segments_are_newline_or_ids(segment):
    with pytest.raises(UserError, match="allowed: newline, or token ids joined by /"):
        parse_policy(f"rkv:trigger=segment,segment={segment}")


def test_per_step_compresses_at_every_excess(make_trace):
    trace = make_trace(n_layers=1)
    found, outcome = compressions(trace, "snapkv:trigger=per-step")
    assert found == list(range(20, 60))
    assert (outcome.held == 2 * 13).all()
    _, buffered = compressions(trace, "snapkv:buffer=1")
    np.testing.assert_array_equal(outcome.evicted_at, buffered.evicted_at)
    found, _ = compressions(trace, "snapkv:trigger=per-step", 25)
    assert found == list(range(26, 60))


def test_next_compression_by_hand():
    for trigger in (PerStep(), Segment()):
        assert trigger.next_compression(20, 40, 50, 2) == 26  # 25 tokens fill it, the next exceeds it
        assert trigger.next_compression(20, 41, 50, 2) == 25
        assert trigger.next_compression(20, 90, 50, 2) == 21
    assert EveryN(interval=10).next_compression(20, 40, 50, 2) == 30
    assert BufferFull(buffer=1).next_compression(20, 40, 50, 2) == 26


@pytest.mark.parametrize("trigger", [BufferFull(buffer=3), EveryN(interval=10), PerStep(), Segment()])
def test_triggers_work_on_counts_of_many_layers(trigger):
    counts = np.array([(20, 40, 50), (20, 41, 50), (35, 90, 50), (35, 50, 50), (1, 2, 7)])
    one_by_one = [trigger.next_compression(*own, 2) for own in counts.tolist()]
    assert trigger.next_compression(*counts.T, 2).tolist() == one_by_one
    _, held, totals = counts.T
    assert trigger.cuts_prompt(held, totals).tolist() == [False, False, True, False, False]
    assert not replace(trigger, prompt="wait").cuts_prompt(held, totals).any()
