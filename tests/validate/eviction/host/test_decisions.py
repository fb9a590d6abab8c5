"""An evicting layer decides exactly as the replay does, row by row, and attends to what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from cases import MODERATE, cases, draw_arrays
from hypothesis import assume, given, settings
from spies import LAYERED, POLICIES, SpyLayer, parsed, replayed

from simulator.engine.compression import Compressor
from simulator.policies.language import Policy, parse_policy
from simulator.policies.parts import Scorer
from simulator.policies.triggers.buffer_full import BufferFull
from traces import write_trace
from traces.shape import ModelShape
from traces.synthetic import make_synthetic
from validate.eviction.host import layer as layer_module

TRIGGERS = ["buffer=9", "trigger=every-n,interval=11,offset=3"]


def batch_of(rows, pad, rng, dtype=torch.float32):
    """Stack rows (heads, tokens, width) of unequal lengths, with noise before the short ones."""
    longest = max(row.shape[1] for row in rows) + pad
    stacked = rng.normal(size=(len(rows), rows[0].shape[0], longest, rows[0].shape[2])) * 5
    for i, row in enumerate(rows):
        stacked[i, :, longest - row.shape[1] :] = row
    return torch.from_numpy(stacked.astype(np.float32)).to(dtype)


def driven(traces, layer, policy, entries, *, drop, pad=0, stride=1, dtype=torch.float32):
    """Feed one layer of several traces to one evicting layer, ``stride`` tokens at a time.

    Yields the layer, what it was fed per row, and its output, after the prompts and after every step. A trace
    that ends is dropped; without ``drop`` it stays, and goes on with noise.
    """
    rng = np.random.default_rng(layer)
    arrays = [
        (trace.queries(layer), trace.keys(layer), rng.normal(size=trace.keys(layer).shape).astype(np.float32))
        for trace in traces
    ]
    prompts = np.array([trace.prompt_tokens for trace in traces])
    totals = np.array([trace.total_tokens for trace in traces])
    pairs = zip(prompts.tolist(), entries, strict=True)
    protected = [policy.protection.ends(n_prompt, budget) for n_prompt, budget in pairs]
    spy = SpyLayer(layer, policy, entries, prompts, range(len(traces)), protected)
    heads = [
        batch_of([row[i][:, :n] for row, n in zip(arrays, prompts, strict=True)], pad, rng, dtype)
        for i in range(3)
    ]
    yield spy, arrays, spy.prefill(*heads, traces[0].scale)
    while (spy.n_tokens < totals[spy.rows]).any():
        if drop and (spy.n_tokens >= totals[spy.rows]).any():
            spy.keep_rows(np.flatnonzero(spy.n_tokens < totals[spy.rows]))
        heads = []
        for i in range(3):
            rows = []
            for row, n in zip(spy.rows, spy.n_tokens, strict=True):
                known = arrays[row][i][:, n : n + stride]
                after = rng.normal(size=(len(known), stride - known.shape[1], known.shape[2]))
                rows.append(np.concatenate([known, after], 1))
            heads.append(batch_of(rows, 0, rng, dtype))
        yield spy, arrays, spy.step(*heads)


def assert_same_decisions(traces, policy, entries, **options):
    """Hold every layer against the replay of each trace alone; give the number of decisions."""
    n_decisions = 0
    replays = [
        replayed(trace, policy, budget, seed)
        for seed, (trace, budget) in enumerate(zip(traces, entries, strict=True))
    ]
    for layer in range(traces[0].shape.n_layers):
        budgets = [
            request.layers[layer].compressor.total // trace.shape.n_kv_heads
            for trace, (request, _, _) in zip(traces, replays, strict=True)
        ]
        *_, (spy, _, _) = driven(traces, layer, policy, budgets, **options)
        for row, (trace, (_, _, expected)) in enumerate(zip(traces, replays, strict=True)):
            # The replay ends with the last token and does not compress after it.
            found = [kept for kept in spy.retained[row] if kept[0] < trace.total_tokens]
            assert found == expected[layer], f"layer {layer}, row {row}"
            n_decisions += len(found)
    return n_decisions


def synthetic_pair(folder, dtype):
    return [
        make_synthetic(
            folder / f"{dtype}-{i}.kvtrace",
            shape=ModelShape(2, 4, 2, 16, dtype),
            prompt_tokens=prompt_tokens,
            total_tokens=total_tokens,
            seed=i,
        )
        for i, (prompt_tokens, total_tokens) in enumerate([(30, 150), (47, 105)])
    ]


@pytest.fixture(scope="module")
def two_traces(tmp_path_factory):
    return synthetic_pair(tmp_path_factory.mktemp("traces"), "float16")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["compress", "wait"])
@pytest.mark.parametrize("redistribute", ["true", "false"])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("text", POLICIES)
def test_retains_what_the_replay_retains(two_traces, text, trigger, redistribute, prompt):
    policy = parsed(text, trigger, f"redistribute={redistribute}", f"prompt={prompt}")
    drop = (redistribute == "true") == (prompt == "wait")
    assert assert_same_decisions(two_traces, policy, [24, 17], drop=drop) > 20


@pytest.mark.parametrize("text", ["random", "rkv+utility:delta=8", "snapkv-paper:window=6"])
@pytest.mark.parametrize("protect", ["none", "prompt+recent:5", "boundary:10%", "sinks:3"])
def test_whatever_is_protected(two_traces, text, protect):
    policy = parsed(text, "buffer=9", f"protect={protect}")
    assert assert_same_decisions(two_traces, policy, [60, 55], drop=True) > 10


@pytest.mark.parametrize("text", [*LAYERED, "streamingllm+wave:sinks=2"])
def test_layers_with_budgets_of_their_own(two_traces, text):
    assert assert_same_decisions(two_traces, parsed(text, "buffer=9"), [24, 17], drop=True) > 20


@pytest.mark.parametrize("text", ["rkv+utility:delta=16", "streamingllm"])
def test_16_bit_entries_are_scored_as_the_replay_scores_them(tmp_path, text):
    pair = synthetic_pair(tmp_path, "bfloat16")
    policy = parsed(text, "buffer=9")
    assert assert_same_decisions(pair, policy, [24, 17], drop=True, dtype=torch.bfloat16) > 20


def test_heads_lend_what_they_cannot_use(tmp_path, rng):
    queries, keys = draw_arrays(rng, "gaussian", 1, 4, 2, 90, 8)
    queries[:, :2] *= 6  # the first head knows what it wants, the second takes over its budget
    queries[:, 2:] /= 10
    trace = write_trace(tmp_path / "a.kvtrace", queries, keys, prompt_tokens=30)
    text = "snapkv+utility:window=1,delta=4,beta=4,mu=0,buffer=2"
    lending, keeping = parsed(text, "redistribute=true"), parsed(text)
    assert replayed(trace, lending, 20, 0)[2] != replayed(trace, keeping, 20, 0)[2]
    for policy in (lending, keeping):
        assert assert_same_decisions([trace], policy, [20], drop=True) > 20


@pytest.mark.parametrize("prompt_tokens", [1, 3, 7])
def test_a_prompt_shorter_than_the_window(tmp_path, rng, prompt_tokens):
    arrays = draw_arrays(rng, "gaussian", 1, 4, 2, 60, 8)
    trace = write_trace(tmp_path / "a.kvtrace", *arrays, prompt_tokens=prompt_tokens)
    assert assert_same_decisions([trace], parsed("snapkv", "buffer=4"), [12], drop=True) > 5


@pytest.mark.slow
@settings(MODERATE, max_examples=25)
@given(cases())
def test_any_policy_on_any_trace_retains_what_the_replay_retains(shared_folder, case):
    # What is fed has values that are noise, and no RoPE.
    assume(not parse_policy(case.policy).scorer.needs)
    other = replace(
        case, n_tokens=case.n_tokens // 2 + 30, prompt_tokens=case.prompt_tokens // 2 + 1, seed=case.seed ^ 1
    )
    traces = []
    for i, each in enumerate((case, other)):
        path = shared_folder / f"evicting-{i}.kvtrace"
        options = {"prompt_tokens": each.prompt_tokens, "overwrite": True}
        traces.append(write_trace(path, *each.arrays(), **options))
    policy = replace(parse_policy(case.policy), redistribute=bool(case.seed % 4 > 1))
    options = {"drop": bool(case.seed % 2), "pad": case.seed % 3, "stride": case.seed % 5 + 1}
    assert_same_decisions(traces, policy, [case.entries, case.entries + 3], **options)


@dataclass(frozen=True)
class Oldest(Scorer):
    """Asks the oldest query of the window alone, and notes what it was shown."""

    name: ClassVar[str] = "oldest"
    shown: ClassVar[list] = []
    window: int = 5

    def score(self, view):
        arrays = (view.keys, view.positions, view.queries)
        told = (view.layer, view.n_tokens, view.kv_head, view.prompt_tokens, view.seed, view.scale)
        self.shown.append((told, *(array.tolist() for array in arrays)))
        return view.keys @ view.queries[:, 0].mean(0)


@pytest.mark.parametrize("prompt_tokens", [2, 30])
def test_scorers_are_shown_what_the_replay_shows_them(tmp_path, rng, prompt_tokens):
    arrays = draw_arrays(rng, "gaussian", 2, 4, 2, 60, 8)
    trace = write_trace(tmp_path / "a.kvtrace", *arrays, prompt_tokens=prompt_tokens)
    policy = Policy("oldest", Oldest(), trigger=BufferFull(buffer=2))
    Oldest.shown.clear()
    replayed(trace, policy, 3, 0)
    views = sorted(Oldest.shown, key=lambda shown: shown[0])
    for layer in range(2):
        Oldest.shown.clear()
        list(driven([trace], layer, policy, [3], drop=True))
        found = [shown for shown in Oldest.shown if shown[0][1] < trace.total_tokens]
        assert found == [shown for shown in views if shown[0][0] == layer]
        assert len(found) > 20


class KeepsTheWorst(Compressor):
    def survivors(self, scores, positions):
        turned = [np.where(np.isinf(own), own, -own) for own in scores]
        return super().survivors(turned, positions)


class NeverReallocates(Compressor):
    def reallocate(self, scores, n_tokens):
        pass


class ReallocatesAlways(Compressor):
    def reallocation_due(self, n_tokens):
        return True


class CompressesLate(Compressor):
    def next_compression(self, n_tokens, n_entries):
        due = super().next_compression(n_tokens, n_entries)
        return due if due in (None, n_tokens) else due + 1


class MissesTheNewestQuery(Compressor):
    def score(self, held, queries, n_tokens):
        return super().score(held, queries[:, [0, *range(queries.shape[1] - 1)]], n_tokens)


class TakesWrongPositions(Compressor):
    def score(self, held, queries, n_tokens):
        shifted = [own + 1 for own in held.positions]
        return super().score(held._replace(positions=shifted), queries, n_tokens)


@pytest.mark.parametrize(
    "broken",
    [
        KeepsTheWorst,
        NeverReallocates,
        ReallocatesAlways,
        CompressesLate,
        MissesTheNewestQuery,
        TakesWrongPositions,
    ],
)
def test_the_comparison_notices_a_layer_that_decides_otherwise(two_traces, monkeypatch, broken):
    policy = parsed("rkv+utility:delta=16,kernel_size=1", "buffer=9")
    monkeypatch.setattr(layer_module, "Compressor", broken)
    with pytest.raises(AssertionError, match="layer 0, row 0"):
        assert_same_decisions(two_traces, policy, [24, 17], drop=True)


@pytest.mark.parametrize("break_pool", [lambda slots: slots[::-1], lambda slots: np.maximum(slots - 1, 0)])
def test_the_comparison_notices_a_pool_that_keeps_other_slots(two_traces, monkeypatch, break_pool):
    class Broken(layer_module.LayerPool):
        def retain(self, row, survivors, room):
            super().retain(row, [None if s is None else break_pool(s) for s in survivors], room)

    monkeypatch.setattr(layer_module, "LayerPool", Broken)
    with pytest.raises(AssertionError, match="layer 0, row 0"):
        assert_same_decisions(two_traces, parsed("snapkv", "buffer=9"), [24, 17], drop=True)


def test_the_comparison_notices_seeds_of_another_row(two_traces):
    other_way_round = two_traces[::-1]
    policy = parsed("random", "buffer=9")
    for row, trace in enumerate(other_way_round):
        _, _, expected = replayed(trace, policy, 20, 1 - row)
        *_, (spy, _, _) = driven(other_way_round, 0, policy, [20, 20], drop=True)
        assert spy.retained[row][: len(expected[0])] != expected[0]


def attention(queries, keys, values, scale):
    """Attend in float64; one query per head of a group, each to all keys."""
    logits = scale * queries.astype(np.float64) @ keys.astype(np.float64).T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights @ values.astype(np.float64) / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("text", "entries"),
    [("rkv:slot_order=score", [24, 17]), ("random+utility:delta=8", [20, 20]), ("fullkv", [20, 20])],
)
def test_a_step_attends_to_exactly_what_is_retained(two_traces, text, entries):
    policy = parsed(text, "buffer=9") if text != "fullkv" else parsed(text)
    held, n_checked = {}, 0
    for spy, arrays, output in driven(two_traces, 1, policy, entries, drop=True):
        is_prefill = output.shape[2] > 1
        for row, number in enumerate(spy.rows):
            n = int(spy.n_tokens[row])
            queries, keys, values = arrays[number]
            for head in range(2):
                group = slice(2 * head, 2 * head + 2)
                for token in range(n) if is_prefill else [n - 1]:
                    seen = list(range(token + 1)) if is_prefill else [*held[number][head], token]
                    expected = attention(
                        queries[group, token], keys[head, seen], values[head, seen], spy.scale
                    )
                    found = output[row, group, token - n].numpy()
                    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
                    n_checked += 1
            held[number] = spy.positions(row)
    assert n_checked == 2 * (150 + 105)


@pytest.mark.parametrize("stride", [2, 7, 40])
def test_many_tokens_at_once_are_the_same_as_one_at_a_time(two_traces, stride):
    policy = parsed("rkv+utility:delta=16", "buffer=9")
    runs = []
    for each in (1, stride):
        steps = list(driven(two_traces, 0, policy, [24, 17], drop=False, stride=each))
        output = torch.cat([output for *_, output in steps], 2)
        runs.append((steps[-1][0], output))
    (one, expected), (many, found) = runs
    for row, trace in enumerate(two_traces):
        width, n_tokens = 47, trace.total_tokens - trace.prompt_tokens  # of the padded prompts
        torch.testing.assert_close(
            found[row, :, : width + n_tokens], expected[row, :, : width + n_tokens], atol=1e-5, rtol=0
        )
        known = [kept for kept in one.retained[row] if kept[0] <= trace.total_tokens]
        assert many.retained[row][: len(known)] == known
        assert len(known) > 5


def test_what_is_held_is_counted_during_attention(two_traces):
    policy = parsed("rkv", "buffer=9")
    replays = [replayed(trace, policy, 20, 0)[0] for trace in two_traces]
    steps = [spy.held.copy() for spy, *_ in driven(two_traces, 0, policy, [20, 20], drop=False)]
    assert steps[0].tolist() == [2 * 30, 2 * 47]  # attention of a prompt sees all of it
    for row, request in enumerate(replays):
        expected = request.layers[0].held
        assert [held[row] for held in steps[1 : len(expected) + 1]] == expected.tolist()


def test_memory_of_dropped_rows_is_freed(two_traces):
    policy = parsed("rkv", "buffer=9")
    sizes = [
        (len(spy.rows), spy.pool.bytes_allocated)
        for spy, *_ in driven(two_traces, 0, policy, [20, 20], drop=True)
    ]
    row = 2 * (20 + 9) * 2 * 16 * 4
    assert set(sizes) == {(2, 2 * row), (1, row)}
    assert all(before[1] >= after[1] for before, after in pairwise(sizes))
