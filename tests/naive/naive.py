"""A slow twin of the replay: float64, dense attention, lists and loops, written from the papers alone.

It imports nothing from the simulator. Where single precision may rightly decide otherwise (a near-tie), the
caller can say how it was decided, and the twin goes on from there; see `Alone`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import naive_allocators
import naive_scorers
import numpy as np
from naive_rules import INFINITY, importance, read_rules, redundancy, softmax


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

    def layer_budgets(self, layers: list[Layer], own: list[int], near) -> list[int]:
        """Give the layer budgets to go on with; ``near`` says whether others are a near-tie of these."""
        return own

    def kept(self, layer: Layer, kv_head: int, own: list[int], scores: list[float]) -> list[int]:
        """Give the positions to go on with, in slot order; ``scores`` belong to the head's slots before."""
        return own


class Layer:
    """One layer of one sequence under a policy, token by token."""

    def __init__(
        self, index, queries, keys, scale, prompt_tokens, rules, budgeted, entries, seed, settle
    ) -> None:
        self.index, self.rules, self.seed, self.settle = index, rules, seed, settle
        self.queries, self.keys = queries.astype(np.float64), keys.astype(np.float64)
        self.scale, self.prompt_tokens, self.budgeted = scale, prompt_tokens, budgeted
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
        self.values, self.rope_theta = None, None
        self.table, self.token_ids, self.segment_ends = None, [], set()
        # What a scorer has noted of each position, and the lengths of the history at which it last looked and
        # at which the next compression was settled.
        self.noted: list[dict[int, float]] = [{} for _ in self.heads]
        self.since, self.settled_at = 0, prompt_tokens

    def full_attention(self, query_head: int) -> list[list[float]]:
        """Causal softmax attention over the whole sequence; row t holds t + 1 weights."""
        keys = self.keys[query_head // self.group_size]
        logits = (self.scale * (self.queries[query_head] @ keys.T)).tolist()
        return [softmax(row[: t + 1]) for t, row in enumerate(logits)]

    @property
    def n_entries(self) -> int:
        return sum(len(head.positions) for head in self.heads)

    def quota(self, head: Head) -> int:
        """How much of its budget a head may fill."""
        if self.rules.scorer != "append-only":
            return head.budget
        granted = self.rules.window + math.ceil(self.rules.rate * self.settled_at)
        return min(head.budget, max(granted, self.budgeted.protected))

    @property
    def capacity(self) -> int:
        return sum(self.quota(head) for head in self.heads)

    def prompt_due(self) -> bool:
        rules = self.rules
        return rules.prompt == "compress" and rules.scorer != "fullkv" and self.n_entries > self.capacity

    def append(self, position: int) -> None:
        for head in self.heads:
            head.positions.append(position)
        self.attend(position)
        self.n_tokens = position + 1

    def resize(self, entries: int) -> None:
        """Change the layer's budget; its heads are equal until they are divided anew."""
        self.total, self.reallocated = self.n_kv_heads * entries, None
        self.settled_at = self.n_tokens
        for head in self.heads:
            head.budget = entries

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
            return (self.n_tokens - rules.offset) % rules.interval == 0 and self.n_entries > self.capacity
        if rules.trigger == "segment":
            ends = self.token_ids[self.n_tokens - 1] in self.segment_ends
            return ends and self.n_entries > self.capacity
        if rules.trigger == "per-step":
            return self.n_entries > self.capacity
        return self.n_entries >= self.capacity + self.n_kv_heads * rules.buffer

    def compress(self) -> None:
        rules = self.rules
        self.settled_at = self.n_tokens
        if rules.scorer in ("h2o", "vatp"):
            naive_scorers.observe(self)
        scores = [self.score(kv_head) for kv_head in range(self.n_kv_heads)]
        if naive_allocators.divides_heads(self):
            own, pooled, tau = naive_allocators.divide_heads(self, scores)
            for head, budget in zip(self.heads, self.settle.budgets(self, own, pooled, tau), strict=True):
                head.budget = budget
            self.reallocated = self.n_tokens
        for kv_head, head in enumerate(self.heads):
            own = head.positions
            if len(head.positions) > self.quota(head):
                own = self.choose(scores[kv_head], head)
            settled = self.settle.kept(self, kv_head, own, scores[kv_head])
            self.n_evicted += len(head.positions) - len(settled)
            head.positions = list(settled)
        self.n_compressions += 1
        self.since = self.n_tokens

    def choose(self, scores: list[float], head: Head) -> list[int]:
        """Keep the best entries up to the quota, ties to the later position, and lay them out."""
        ranked = sorted(zip(scores, head.positions, strict=True), reverse=True)[: self.quota(head)]
        if self.rules.slot_order == "chronological":
            return sorted(position for _, position in ranked)
        scored = [position for score, position in ranked if score != INFINITY]
        protected = sorted(position for score, position in ranked if score == INFINITY)
        sinks = [position for position in protected if position < self.budgeted.sinks]
        return sinks + scored + protected[len(sinks) :]

    def is_protected(self, position: int) -> bool:
        return position < self.budgeted.sinks or position >= self.n_tokens - self.budgeted.recent

    @property
    def n_left_out(self) -> int:
        """Last entries that a window does not score."""
        return min(self.rules.window, self.budgeted.recent, self.n_tokens)

    @property
    def n_scored_sinks(self) -> int:
        """First positions that a scorer with sinks leaves out."""
        return min(self.rules.sinks, self.budgeted.sinks)

    def window_attention(self, kv_head: int) -> list[float]:
        """Pooled attention of the window's queries to the candidates of one head."""
        n_window, positions = min(self.rules.window, self.n_tokens), self.heads[kv_head].positions
        keys = self.held_keys(kv_head)[: len(positions) - self.n_left_out]
        if not len(keys):
            return []
        window = range(self.n_tokens - n_window, self.n_tokens)
        queries = self.queries[kv_head * self.group_size : (kv_head + 1) * self.group_size, list(window)]
        seen = [[position <= row for position in positions[: len(keys)]] for row in window]
        return importance(queries, keys, self.scale, self.rules, seen)

    def score(self, kv_head: int) -> list[float]:
        """Score what a head holds, slot by slot; protected entries are infinite."""
        rules, positions = self.rules, self.heads[kv_head].positions
        if rules.scorer in naive_scorers.PER_HEAD:
            scores = naive_scorers.PER_HEAD[rules.scorer](self, kv_head)
        elif rules.scorer == "streamingllm":
            scores = [float(position) for position in positions]
        elif rules.scorer == "random-unified":
            drawn = np.random.default_rng([self.seed, self.n_tokens]).random(self.n_tokens, dtype=np.float32)
            scores = [float(drawn[position]) for position in positions]
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
        rules, keys, attention = self.rules, self.held_keys(kv_head), self.window_attention(kv_head)
        if rules.scorer == "rkv" and attention:
            repeated = redundancy(keys, rules)
            attention = [
                rules.alpha * own - (1 - rules.alpha) * repeated[j] for j, own in enumerate(attention)
            ]
        return attention + [0.0] * (len(keys) - len(attention))

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


def run_together(layers: list[Layer], rules, entries: int, settle) -> None:
    """Advance all layers token by token. At one token layers are divided first, and then compressed."""
    is_dynamic = rules.layers in naive_allocators.DYNAMIC and rules.scorer != "fullkv"
    prompt_tokens, total_tokens = layers[0].prompt_tokens, layers[0].total_tokens

    def divide() -> None:
        own, near = naive_allocators.measured_layer_budgets(rules, layers, entries)
        for layer, budget in zip(layers, settle.layer_budgets(layers, own, near), strict=True):
            layer.resize(budget)

    due = [layer.prompt_due() for layer in layers]
    if is_dynamic:
        divide()
        due = [before or layer.prompt_due() for before, layer in zip(due, layers, strict=True)]
    for position in range(prompt_tokens, total_tokens + 1):
        for layer, is_due in zip(layers, due, strict=True):
            if is_due:
                layer.compress()
        if position == total_tokens:
            return
        for layer in layers:
            layer.append(position)
        n_decoded, is_last = position + 1 - prompt_tokens, position + 1 == total_tokens
        # What is due stays so, whatever the layer's new budget is.
        due = [layer.due() and not is_last for layer in layers]
        again = rules.layers == "wave-dynamic" and rules.layer_delta and n_decoded % rules.layer_delta == 0
        if is_dynamic and again and not is_last:
            divide()


def segment_ends(rules, trace) -> set[int]:
    """Ids of the tokens that end a segment."""
    if rules.segment == "newline":
        return {token for token, text in trace.manifest.vocabulary.items() if "\n" in text}
    return set(map(int, rules.segment.split("/")))


def simulate(trace, text: str, entries: int, *, demand=None, seed: int = 0, settle=None) -> Run:
    """Run a policy over a trace; ``demand`` is the wave of its model, layer by layer."""
    rules = read_rules(text)
    seen = naive_allocators.as_budgeted(rules, trace.prompt_tokens, entries)
    sizes = trace.shape.n_layers, trace.shape.n_kv_heads
    budgets = naive_allocators.layer_budgets(seen, sizes[0], entries, demand, sizes[1])
    tables = naive_allocators.head_rows(rules, demand, *sizes)
    layers = []
    for index, budget in enumerate(budgets):
        arrays = trace.queries(index), trace.keys(index), trace.scale
        of_text = trace.prompt_tokens, rules, seen
        layers.append(Layer(index, *arrays, *of_text, budget, seed, settle or Alone()))
        if trace.has_values:
            layers[-1].values = trace.values(index).astype(np.float64)
        layers[-1].rope_theta = trace.manifest.rope.get("rope_theta")
        layers[-1].table = tables[index]
        layers[-1].token_ids = trace.token_ids.tolist()
        layers[-1].segment_ends = segment_ends(rules, trace)
    run_together(layers, seen, entries, settle or Alone())
    return Run(
        mass=np.array([layer.mass for layer in layers]),
        held=np.sum([layer.held for layer in layers], axis=0),
        missed=np.array([layer.missed for layer in layers]),
        n_evicted=sum(layer.n_evicted for layer in layers),
        layers=layers,
    )
