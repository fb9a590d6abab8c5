"""The quick evicting decode decides exactly as the replay does, row by row, and attends to what is left."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from agreement import make_wave
from cases import MODERATE, cases, draw_arrays
from hypothesis import given, settings
from tiny_models import tiny_model

from simulator.engine import Engine
from simulator.policies.base import Scorer
from simulator.policies.triggers import BufferFull
from simulator.policy import Policy, parse_policy
from simulator.request import Request
from traces import write_trace
from traces.errors import InfeasibleBudgetError
from traces.shape import ModelShape
from traces.synthetic import make_synthetic
from validate.reasoner import evicting
from validate.reasoner.evicting import EvictingLayer, decode_evicting
from validate.reasoner.tasks import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

POLICIES = [
    "streamingllm",
    "snapkv",
    "rkv",
    "rkv:slot_order=score",
    "rkv+utility:delta=16",
    "random",
    "random-prompt",
]
TRIGGERS = ["buffer=9", "trigger=every-n,interval=11,offset=3"]
NAME = "tiny"


def parsed(text, *parameters):
    return parse_policy(text + (",", ":")[":" not in text] + ",".join(parameters) if parameters else text)


class Spy(EvictingLayer):
    """A layer that notes, per row, who stays after each compression and what attention was given."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rows = np.arange(len(self.prompts))
        self.retained, self.seen = defaultdict(list), defaultdict(list)

    def prefill(self, query, key, value, scaling):
        for row, n_tokens in enumerate(self.prompts):
            self.seen[row].append([heads[row, :, -n_tokens:].clone() for heads in (query, key, value)])
        return super().prefill(query, key, value, scaling)

    def step(self, query, key, value, n_tokens):
        for row, number in enumerate(self.rows):
            self.seen[number].append([heads[row].clone() for heads in (query, key, value)])
        return super().step(query, key, value, n_tokens)

    def compress(self, row, n_tokens):
        super().compress(row, n_tokens)
        self.retained[self.rows[row]].append((n_tokens, self.held(row)))

    def keep_rows(self, rows):
        super().keep_rows(rows)
        self.rows = self.rows[rows]

    def held(self, row):
        """List the positions of one row, per head, in slot order."""
        return [self.positions[row, h, :n].tolist() for h, n in enumerate(self.lengths[row].tolist())]

    def everything(self, row):
        """Join the queries, keys and values that one row was given; each (heads, tokens, width)."""
        return [torch.cat(parts, 1).numpy() for parts in zip(*self.seen[row], strict=True)]


def replayed(trace, policy, entries, seed):
    """Replay a trace; give its requests' layers, and per layer what each compression retained."""
    waves = {trace.model: make_wave(trace, range(1, trace.shape.n_layers + 1))}
    request = Request(trace, policy, entries, seed=seed, waves=waves, keep_retained=True)
    Engine([request]).run()
    found = []
    for layer in request.layers:
        compressions = defaultdict(list)
        for kept in layer.retained:
            compressions[kept.compression, kept.n_tokens].append(kept.positions.tolist())
        found.append([(n_tokens, heads) for (_, n_tokens), heads in compressions.items()])
    return request.layers, found


def batch_of(rows, pad, rng):
    """Stack rows (heads, tokens, width) of unequal lengths, with noise before the short ones."""
    longest = max(row.shape[1] for row in rows) + pad
    stacked = rng.normal(size=(len(rows), rows[0].shape[0], longest, rows[0].shape[2])) * 5
    for i, row in enumerate(rows):
        stacked[i, :, longest - row.shape[1] :] = row
    return torch.from_numpy(stacked.astype(np.float32))


def driven(traces, layer, policy, entries, *, drop, pad=0, watch=None):
    """Feed one layer of several traces to one EvictingLayer, token by token; a trace that ends is dropped.

    Without ``drop`` it stays, and goes on with noise.
    """
    rng = np.random.default_rng(layer)
    arrays = [
        (trace.queries(layer), trace.keys(layer), rng.normal(size=trace.keys(layer).shape).astype(np.float32))
        for trace in traces
    ]
    prompts = np.array([trace.prompt_tokens for trace in traces])
    totals = np.array([trace.total_tokens for trace in traces])
    spy = Spy(layer, policy, entries, prompts, range(len(traces)))
    heads = [
        batch_of([row[i][:, :n] for row, n in zip(arrays, prompts, strict=True)], pad, rng) for i in range(3)
    ]
    output = spy.prefill(*heads, traces[0].scale)
    if watch:
        watch(spy, arrays, prompts, output)
    n_tokens = prompts.copy()
    while (n_tokens < totals[spy.rows]).any():
        if drop and (n_tokens >= totals[spy.rows]).any():
            kept = np.flatnonzero(n_tokens < totals[spy.rows])
            n_tokens = n_tokens[kept]
            spy.keep_rows(kept)
        n_tokens = n_tokens + 1
        heads = []
        for i in range(3):
            rows = []
            for row, n in zip(spy.rows, n_tokens, strict=True):
                known = arrays[row][i][:, n - 1 : n]
                rows.append(known if known.shape[1] else rng.normal(size=(len(known), 1, known.shape[2])))
            heads.append(batch_of(rows, 0, rng))
        output = spy.step(*heads, n_tokens)
        if watch:
            watch(spy, arrays, n_tokens, output)
    return spy


def assert_same_decisions(traces, policy, entries, **options):
    """Hold every layer against the replay of each trace alone; give the number of decisions."""
    n_decisions = 0
    replays = [
        replayed(trace, policy, budget, seed)
        for seed, (trace, budget) in enumerate(zip(traces, entries, strict=True))
    ]
    for layer in range(traces[0].shape.n_layers):
        budgets = [
            layers[layer].total // trace.shape.n_kv_heads
            for trace, (layers, _) in zip(traces, replays, strict=True)
        ]
        spy = driven(traces, layer, policy, budgets, **options)
        for row, (trace, (_, expected)) in enumerate(zip(traces, replays, strict=True)):
            # The replay ends with the last token and does not compress after it.
            found = [kept for kept in spy.retained[row] if kept[0] < trace.total_tokens]
            assert found == expected[layer], f"layer {layer}, row {row}"
            n_decisions += len(found)
    return n_decisions


@pytest.fixture(scope="module")
def two_traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    shape = ModelShape(2, 4, 2, 16, "float16")
    return [
        make_synthetic(folder / f"{i}.kvtrace", shape=shape, prompt_tokens=p, total_tokens=n, seed=i)
        for i, (p, n) in enumerate([(30, 150), (47, 105)])
    ]


@pytest.mark.parametrize("prompt", ["compress", "wait"])
@pytest.mark.parametrize("redistribute", ["true", "false"])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("text", POLICIES)
def test_retains_what_the_replay_retains(two_traces, text, trigger, redistribute, prompt):
    policy = parsed(text, trigger, f"redistribute={redistribute}", f"prompt={prompt}")
    drop = (redistribute == "true") == (prompt == "wait")
    assert assert_same_decisions(two_traces, policy, [24, 17], drop=drop) > 20


@pytest.mark.parametrize("text", ["rkv+pyramid", "streamingllm+wave:sinks=2", "reasonalloc:delta=16"])
def test_layers_with_budgets_of_their_own(two_traces, text):
    assert_same_decisions(two_traces, parsed(text, "buffer=9"), [24, 17], drop=True)


def test_heads_lend_what_they_cannot_use(tmp_path, rng):
    queries, keys = draw_arrays(rng, "gaussian", 1, 4, 2, 90, 8)
    queries[:, :2] *= 6  # the first head knows what it wants, the second takes over its budget
    queries[:, 2:] /= 10
    trace = write_trace(tmp_path / "a.kvtrace", queries, keys, prompt_tokens=30)
    text = "snapkv+utility:window=1,delta=4,beta=4,mu=0,buffer=2"
    lending, keeping = parsed(text, "redistribute=true"), parsed(text)
    assert replayed(trace, lending, 20, 0)[1] != replayed(trace, keeping, 20, 0)[1]
    for policy in (lending, keeping):
        assert assert_same_decisions([trace], policy, [20], drop=True) > 20


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
    _, expected = replayed(trace, policy, 3, 0)
    views = sorted(Oldest.shown, key=lambda shown: shown[0])
    for layer in range(2):
        Oldest.shown.clear()
        spy = driven([trace], layer, policy, [3], drop=True)
        found = [shown for shown in Oldest.shown if shown[0][1] < trace.total_tokens]
        assert found == [shown for shown in views if shown[0][0] == layer]
        assert len(found) > 20
        assert spy.retained[0][: len(expected[layer])] == expected[layer]
    Oldest.shown.clear()


@settings(MODERATE, max_examples=25)
@given(cases())
def test_any_policy_on_any_trace_retains_what_the_replay_retains(shared_folder, case):
    other = replace(
        case, n_tokens=case.n_tokens // 2 + 30, prompt_tokens=case.prompt_tokens // 2 + 1, seed=case.seed ^ 1
    )
    traces = []
    for i, each in enumerate((case, other)):
        path = shared_folder / f"evicting-{i}.kvtrace"
        options = {"prompt_tokens": each.prompt_tokens, "overwrite": True}
        traces.append(write_trace(path, *each.arrays(), **options))
    policy = replace(parse_policy(case.policy), redistribute=bool(case.seed % 4 > 1))
    entries = [case.entries, case.entries + 3]
    assert_same_decisions(traces, policy, entries, drop=bool(case.seed % 2), pad=case.seed % 3)


@pytest.mark.parametrize("prompt_tokens", [1, 3, 7])
def test_a_prompt_shorter_than_the_window(tmp_path, rng, prompt_tokens):
    arrays = draw_arrays(rng, "gaussian", 1, 4, 2, 60, 8)
    trace = write_trace(tmp_path / "a.kvtrace", *arrays, prompt_tokens=prompt_tokens)
    assert assert_same_decisions([trace], parsed("snapkv", "buffer=4"), [12], drop=True) > 5


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

    def watch(spy, arrays, n_tokens, output):
        nonlocal n_checked
        prefilled = output.shape[2] > 1
        for row, number in enumerate(spy.rows):
            n = int(n_tokens[row])
            queries, keys, values = arrays[number]
            if n > queries.shape[1]:
                continue
            for head in range(2):
                group = slice(2 * head, 2 * head + 2)
                tokens = range(n) if prefilled else [n - 1]
                for token in tokens:
                    seen = list(range(token + 1)) if prefilled else [*held[number][head], token]
                    expected = attention(
                        queries[group, token], keys[head, seen], values[head, seen], spy.scale
                    )
                    found = output[row, group, token - n].numpy()
                    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
                    n_checked += 1
            held[number] = spy.held(row)

    driven(two_traces, 1, policy, entries, drop=True, watch=watch)
    assert n_checked == 2 * (150 + 105)


def problem_prompts(tokenizer):
    families = ["walk", "program", "machine", "walk"]
    problems = [make_problem(family, 1, i, 4 + i, 60) for i, family in enumerate(families)]
    prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
    assert len({len(prompt) for prompt in prompts}) == 4
    return prompts


@pytest.fixture(scope="module")
def small():
    """Give a random model, prompts of unequal length, and what it writes after each, in a batch."""
    tokenizer = build_tokenizer()
    model = tiny_model("llama", 2, vocab_size=VOCABULARY_SIZE)
    prompts = problem_prompts(tokenizer)
    tokenizer.padding_side = "left"
    encoded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**encoded, do_sample=False, max_new_tokens=90, eos_token_id=None, pad_token_id=0)
    written = ids[:, encoded["input_ids"].shape[1] :].tolist()
    assert all(len(set(row)) > 3 for row in written)
    return SimpleNamespace(model=model, prompts=prompts, written=written)


def tiny_waves():
    shape = SimpleNamespace(n_kv_heads=2)
    return {NAME: make_wave(SimpleNamespace(model=NAME, shape=shape), (3, 1))}


@pytest.mark.parametrize("text", ["fullkv", "rkv+pyramid", "reasonalloc", *POLICIES])
def test_a_budget_above_the_length_writes_what_generate_writes(small, text):
    written = decode_evicting(
        small.model,
        small.prompts,
        parse_policy(text),
        [4000] * 4,  # a pyramid's last layer gets a twentieth
        [30] * 4,
        eos=-1,
        name=NAME,
        waves=tiny_waves(),
    )
    assert written == [row[:30] for row in small.written]


def test_rows_end_with_the_end_token_or_at_their_own_limit(small):
    eos = small.written[1][12]
    limits = [90, 50, 17, 33]
    expected = [row[:limit] for row, limit in zip(small.written, limits, strict=True)]
    expected = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert [*map(len, expected)] != limits
    arguments = (small.model, small.prompts, parse_policy("fullkv"), [1] * 4, limits)
    assert decode_evicting(*arguments, eos=eos) == expected


@pytest.mark.parametrize("text", [*POLICIES, "rkv+pyramid", "reasonalloc:delta=16"])
def test_a_decode_under_eviction_decides_as_the_replay_of_what_it_saw(small, text, tmp_path, monkeypatch):
    spies = []

    def spy(*arguments):
        spies.append(Spy(*arguments))
        return spies[-1]

    monkeypatch.setattr(evicting, "EvictingLayer", spy)
    policy, entries, limits = parsed(text, "buffer=7"), [22, 14, 30, 18], [90, 40, 66, 20]
    written = decode_evicting(
        small.model, small.prompts, policy, entries, limits, eos=-1, name=NAME, waves=tiny_waves()
    )
    assert [*map(len, written)] == limits
    assert len(spies) == 2
    assert {len(layer.rows) for layer in spies} == {1}  # rows that had ended were dropped
    waves = tiny_waves()
    for row, (prompt, budget) in enumerate(zip(small.prompts, entries, strict=True)):
        queries, keys, _ = zip(*(layer.everything(row) for layer in spies), strict=True)
        options = {"prompt_tokens": len(prompt), "dtype": "float32", "model": NAME}
        trace = write_trace(tmp_path / f"{row}.kvtrace", queries, keys, **options)
        request = Request(trace, policy, budget, seed=row, waves=waves, keep_retained=True)
        (outcome,) = Engine([request]).run()
        expected = defaultdict(list)
        for kept in outcome.retained:
            expected[kept.layer, kept.n_tokens].append(kept.positions.tolist())
        found = {
            (number, n_tokens): heads
            for number, layer in enumerate(spies)
            for n_tokens, heads in layer.retained[row]
            if n_tokens < trace.total_tokens
        }
        assert found == expected
        assert len(found) > 2


def test_a_row_is_decoded_as_if_it_were_alone(small):
    policy, entries, limits = parsed("rkv+utility:delta=16", "buffer=7"), [22, 14, 30, 18], [90, 40, 66, 20]
    together = decode_evicting(small.model, small.prompts, policy, entries, limits, eos=-1)
    assert together != [row[:limit] for row, limit in zip(small.written, limits, strict=True)]
    for row, (prompt, budget, limit) in enumerate(zip(small.prompts, entries, limits, strict=True)):
        alone = decode_evicting(small.model, [prompt], policy, [budget], [limit], eos=-1, seeds=[row])
        assert alone == [together[row]]


def test_seeds_are_those_that_are_given(small):
    arguments = (small.model, small.prompts[:2], parsed("random", "buffer=7"), [14, 14], [40, 40])
    default, other = (decode_evicting(*arguments, eos=-1, seeds=seeds) for seeds in (None, [5, 6]))
    assert default == decode_evicting(*arguments, eos=-1, seeds=[0, 1])
    assert default != other


@pytest.mark.parametrize(
    ("text", "entries", "words"),
    [
        ("rkv", [40, 8, 40, 40], "allowed: at least 9"),
        ("streamingllm:sinks=4", [4, 40, 40, 40], "allowed: at least 5"),
        ("random+pyramid:recent=0", [40, 40, 40, 1], "leaves layer 1 no entry"),
    ],
)
def test_a_budget_that_cannot_hold_what_is_protected_is_refused(small, text, entries, words):
    with pytest.raises(InfeasibleBudgetError, match=words):
        decode_evicting(small.model, small.prompts, parse_policy(text), entries, [5] * 4, eos=-1)
