"""Watches evicting layers at work, and replays what they saw."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Executor, Future
from types import SimpleNamespace

import numpy as np
import torch
from agreement import make_wave

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from traces import write_trace
from validate.eviction.host.layer import EvictingLayer

# Every policy whose layers all have the same budget.
POLICIES = [
    "streamingllm",
    "snapkv",
    "rkv",
    "rkv:slot_order=score",
    "rkv+utility:delta=16",
    "random",
    "random-prompt",
]
LAYERED = ["pyramid-rkv", "rkv+wave", "reasonalloc:delta=16"]
NAME = "tiny"


def parsed(text, *parameters):
    """Read a policy with more parameters than ``text`` has."""
    return parse_policy(text + (",", ":")[":" not in text] + ",".join(parameters) if parameters else text)


def tiny_waves(demand=(3, 1)):
    """Give a wave of the tiny models, two KV heads each."""
    shape = SimpleNamespace(n_kv_heads=2)
    return {NAME: make_wave(SimpleNamespace(model=NAME, shape=shape), demand)}


class SpyLayer(EvictingLayer):
    """A layer that notes, per row, what attention was given and who stays after each compression.

    Rows keep the numbers they began with; ``rows`` names those that are left.
    """

    def prefill(self, query, key, value, scale):
        self.rows = np.arange(len(query))
        self.retained, self.given = defaultdict(list), defaultdict(list)
        for row, n_tokens in enumerate(self.n_tokens):
            self.given[row].append([heads[row, :, -n_tokens:].clone() for heads in (query, key, value)])
        output = super().prefill(query, key, value, scale)
        for row, compressor in enumerate(self.compressors):
            if compressor.n_compressions:
                self._note(row)
        return output

    def step(self, query, key, value, token_ids=None):
        for row, number in enumerate(self.rows):
            self.given[number].append([heads[row].clone() for heads in (query, key, value)])
        return super().step(query, key, value, token_ids)

    def compress(self, row):
        super().compress(row)
        self._note(row)

    def keep_rows(self, rows):
        super().keep_rows(rows)
        self.rows = self.rows[rows]

    def positions(self, row):
        """List the positions of one row, per KV head, in slot order."""
        n_kv_heads = self.pool.lengths.shape[1]
        return [self.pool.positions[self.pool.segment(row, head)].tolist() for head in range(n_kv_heads)]

    def _note(self, row):
        self.retained[self.rows[row]].append((int(self.n_tokens[row]), self.positions(row)))


def replayed(trace, policy, entries, seed, waves=None):
    """Replay a trace alone; give the request, its outcome, and what each compression retained, per layer."""
    waves = waves or {trace.model: make_wave(trace, range(1, trace.shape.n_layers + 1))}
    request = Request(trace, policy, entries, seed=seed, waves=waves, keep_retained=True)
    (outcome,) = Engine([request]).run()
    found = []
    for layer in request.layers:
        compressions = defaultdict(list)
        for kept in layer.retained:
            compressions[kept.compression, kept.n_tokens].append(kept.positions.tolist())
        found.append([(n_tokens, heads) for (_, n_tokens), heads in compressions.items()])
    return request, outcome, found


def write_seen(path, layers, row, prompt_tokens, n_steps):
    """Write the trace of what one row's attention was given in every layer, up to a decode step."""
    arrays = []
    for layer in layers:
        parts = zip(*layer.given[row][: 1 + n_steps], strict=True)
        queries, keys, _ = (torch.cat(tensors, 1).float().numpy() for tensors in parts)
        arrays.append((queries, keys))
    queries, keys = zip(*arrays, strict=True)
    return write_trace(path, queries, keys, prompt_tokens=prompt_tokens, dtype="float32", model=NAME)


class InThisProcess(Executor):
    """Takes the place of a process, whose start takes longer than all that it does here."""

    def __init__(self, n_workers, initializer, initargs):
        initializer(*initargs)

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
