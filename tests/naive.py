"""A slow twin of the replay: float64, dense attention, lists and loops, written from the papers alone.

It imports nothing from the simulator. Where single precision may rightly decide otherwise (a near-tie), the
caller can say how it was decided, and the twin goes on from there; see `Alone`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from naive_rules import (
    INFINITY,
    contest,
    head_budgets,
    importance,
    layer_budgets,
    read_rules,
    redundancy,
    softmax,
)


@dataclass
class Head:
    """What one KV head holds: positions in slot order."""

    positions: list[int]
    budget: int


class Alone:
    """Settles nothing: the twin's own decisions stand."""

    def budgets(self, layer: Layer, own: list[int], pooled: list[list[float]], tau: float) -> list[int]:
        """Give the head budgets to go on with."""
        return own

    def kept(self, layer: Layer, kv_head: int, own: list[int], scores: list[float]) -> list[int]:
        """Give the positions to go on with, in slot order; ``scores`` belong to the head's slots before."""
        return own


class Layer:
    """One layer of one sequence under a policy, token by token."""

    def __init__(self, index, queries, keys, scale, prompt_tokens, rules, entries, seed, settle) -> None:
        self.index, self.rules, self.seed, self.settle = index, rules, seed, settle
        self.queries, self.keys = queries.astype(np.float64), keys.astype(np.float64)
        self.scale, self.prompt_tokens = scale, prompt_tokens
        self.n_kv_heads, self.total_tokens, _ = keys.shape
        self.group_size = len(queries) // self.n_kv_heads
        self.total = self.n_kv_heads * entries
        self.heads = [Head(list(range(prompt_tokens)), entries) for _ in range(self.n_kv_heads)]
        self.weights = [self.full_attention(head) for head in range(len(queries))]
        self.n_tokens, self.n_compressions, self.reallocated = prompt_tokens, 0, None
        self.mass: list[list[float]] = [[] for _ in queries]
        self.missed: list[list[bool]] = [[] for _ in queries]
        self.held: list[int] = []
        self.n_evicted = 0

    def full_attention(self, query_head: int) -> list[list[float]]:
        """Causal softmax attention over the whole sequence; row t holds t + 1 weights."""
        keys = self.keys[query_head // self.group_size]
        logits = (self.scale * (self.queries[query_head] @ keys.T)).tolist()
        return [softmax(row[: t + 1]) for t, row in enumerate(logits)]

    @property
    def n_entries(self) -> int:
        return sum(len(head.positions) for head in self.heads)

    def run(self) -> None:
        if self.rules.prompt == "compress" and self.rules.scorer != "fullkv" and self.n_entries > self.total:
            self.compress()
        for position in range(self.prompt_tokens, self.total_tokens):
            for head in self.heads:
                head.positions.append(position)
            self.attend(position)
            self.n_tokens = position + 1
            if self.n_tokens < self.total_tokens and self.due():
                self.compress()

    def attend(self, position: int) -> None:
        self.held.append(self.n_entries)
        for query_head, weights in enumerate(self.weights):
            row = weights[position]
            retained = self.heads[query_head // self.group_size].positions
            self.mass[query_head].append(math.fsum(row[j] for j in retained))
            strongest = max(range(position + 1), key=lambda j: (row[j], j))
            self.missed[query_head].append(strongest not in retained)

    def due(self) -> bool:
        rules = self.rules
        if rules.scorer == "fullkv":
            return False
        if rules.trigger == "every-n":
            return (self.n_tokens - rules.offset) % rules.interval == 0 and self.n_entries > self.total
        return self.n_entries >= self.total + self.n_kv_heads * rules.buffer

    def compress(self) -> None:
        rules = self.rules
        scores = [self.score(kv_head) for kv_head in range(self.n_kv_heads)]
        waited = None if self.reallocated is None else self.n_tokens - self.reallocated
        if rules.heads == "utility" and rules.delta > 0 and (waited is None or waited >= rules.delta):
            pooled, tau = contest(rules, scores, self.total)
            demand = [sum(score >= tau for score in head) for head in pooled]
            own = head_budgets(rules, demand, self.total)
            for head, budget in zip(self.heads, self.settle.budgets(self, own, pooled, tau), strict=True):
                head.budget = budget
            self.reallocated = self.n_tokens
        for kv_head, head in enumerate(self.heads):
            own = head.positions
            if len(head.positions) > head.budget:
                own = self.choose(scores[kv_head], head)
            settled = self.settle.kept(self, kv_head, own, scores[kv_head])
            self.n_evicted += len(head.positions) - len(settled)
            head.positions = list(settled)
        self.n_compressions += 1

    def choose(self, scores: list[float], head: Head) -> list[int]:
        """Keep the best ``budget`` entries, ties to the later position, and lay them out."""
        ranked = sorted(zip(scores, head.positions, strict=True), reverse=True)[: head.budget]
        if self.rules.slot_order == "chronological":
            return sorted(position for _, position in ranked)
        scored = [position for score, position in ranked if score != INFINITY]
        protected = sorted(position for score, position in ranked if score == INFINITY)
        sinks = [position for position in protected if position < self.rules.sinks]
        return sinks + scored + protected[len(sinks) :]

    def is_protected(self, position: int) -> bool:
        return position < self.rules.sinks or position >= self.n_tokens - self.rules.recent

    def score(self, kv_head: int) -> list[float]:
        """Score what a head holds, slot by slot; protected entries are infinite."""
        rules, positions = self.rules, self.heads[kv_head].positions
        if rules.scorer == "streamingllm":
            scores = [float(position) for position in positions]
        elif rules.scorer in ("random", "random-prompt"):
            rng = np.random.default_rng([self.seed, self.index, kv_head, self.n_tokens])
            scores = rng.random(len(positions), dtype=np.float32).astype(np.float64).tolist()
            if rules.scorer == "random-prompt":
                is_prompt = [position < self.prompt_tokens for position in positions]
                scores = [score + prompt for score, prompt in zip(scores, is_prompt, strict=True)]
        else:
            scores = self.attention_scores(kv_head)
        return [
            INFINITY if self.is_protected(position) else score
            for position, score in zip(positions, scores, strict=True)
        ]

    def attention_scores(self, kv_head: int) -> list[float]:
        rules, keys = self.rules, self.held_keys(kv_head)
        n_protected = min(rules.window, self.n_tokens)
        n_candidates = len(keys) - n_protected
        if n_candidates == 0:
            return [0.0] * len(keys)
        window = slice(self.n_tokens - n_protected, self.n_tokens)
        group = slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)
        attention = importance(self.queries[group, window], keys[:n_candidates], self.scale, rules)
        if rules.scorer == "rkv":
            repeated = redundancy(keys, rules)
            attention = [
                rules.alpha * attention[j] - (1 - rules.alpha) * repeated[j] for j in range(n_candidates)
            ]
        return attention + [0.0] * n_protected

    def held_keys(self, kv_head: int) -> np.ndarray:
        return self.keys[kv_head][self.heads[kv_head].positions]


@dataclass(frozen=True)
class Run:
    """What the twin measured; arrays as the replay's outcome has them."""

    mass: np.ndarray
    held: np.ndarray
    missed: np.ndarray
    n_evicted: int
    layers: list[Layer]


def simulate(trace, text: str, entries: int, *, demand=None, seed: int = 0, settle=None) -> Run:
    """Run a policy over a trace; ``demand`` is the wave of its model, layer by layer."""
    rules = read_rules(text)
    budgets = layer_budgets(rules, trace.shape.n_layers, entries, demand)
    layers = []
    for index, budget in enumerate(budgets):
        arrays = trace.queries(index), trace.keys(index), trace.scale
        layers.append(Layer(index, *arrays, trace.prompt_tokens, rules, budget, seed, settle or Alone()))
        layers[-1].run()
    return Run(
        mass=np.array([layer.mass for layer in layers]),
        held=np.sum([layer.held for layer in layers], axis=0),
        missed=np.array([layer.missed for layer in layers]),
        n_evicted=sum(layer.n_evicted for layer in layers),
        layers=layers,
    )
