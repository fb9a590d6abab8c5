"""A slow twin of the replay: float64, dense attention, lists and loops, written from the papers alone.

It imports nothing from the simulator. Where single precision may rightly decide otherwise (a near-tie), the
caller can say how it was decided, and the twin goes on from there; see `Alone`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

INFINITY = float("inf")


@dataclass(frozen=True)
class Rules:
    """A policy, spelled out; the defaults are those of the papers and of the written contract."""

    scorer: str = "rkv"
    layers: str = "uniform"
    heads: str = "uniform"
    trigger: str = "buffer-full"
    # scorers
    alpha: float = 0.1
    similarity_threshold: float = 0.5
    no_match: str = "skip"
    window: int = 8
    kernel_size: int = 7
    group_reduce: str = "max_logits"
    slot_order: str = "chronological"
    sinks: int = 0
    recent: int = 0
    # layer budgets
    pyramid_beta: float = 20.0
    gamma: float = 0.5
    layer_floor: float = 0.25
    layer_cap: float = 2.0
    # head budgets
    delta: int = 128
    beta: float = 0.5
    mu: float = 0.25
    head_cap: float = 2.0
    pooling: str = "none"
    # when
    buffer: int = 128
    interval: int = 128
    offset: int = 0
    prompt: str = "compress"

    @property
    def protected(self) -> int:
        return self.sinks + self.recent


def read_rules(text: str) -> Rules:
    """Read ``scorer[+layers][+heads][:name=value,...]``."""
    name, _, tail = text.partition(":")
    name = {"reasonalloc": "rkv+wave+utility", "pyramid-rkv": "rkv+pyramid"}.get(name, name)
    scorer, *others = name.split("+")
    rules = Rules(scorer=scorer)
    if scorer == "streamingllm":
        rules = replace(rules, sinks=4)
    if scorer in ("random", "random-prompt"):
        rules = replace(rules, recent=8)
    for part in others:
        rules = replace(rules, **{"heads" if part == "utility" else "layers": part})
    kinds = {item.name: type(getattr(rules, item.name)) for item in fields(Rules)}
    for piece in filter(None, tail.split(",")):
        key, _, value = piece.partition("=")
        rules = replace(rules, **{key: kinds[key](value)})
    if scorer in ("snapkv", "rkv"):
        rules = replace(rules, recent=rules.window)
    return rules


# ---- budgets ----------------------------------------------------------------------------------------------


def round_to_total(shares: list[float], total: int) -> list[int]:
    """Round by largest remainder, ties to the lower index."""
    whole = [math.floor(share + 1e-9) for share in shares]
    remainders = [round(share - floor, 9) for share, floor in zip(shares, whole, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def robustify(
    demand: list[float], total: int, exponent: float, floor: float, cap: float, protected: int
) -> list[int]:
    """Smooth, scale, clip to the bounds, fill up to the total within them, round."""
    n = len(demand)
    mean = total / n
    lower = max(min(math.ceil(floor * mean - 1e-9), total // n), protected)
    upper = max(math.floor(cap * mean + 1e-9), -(-total // n))
    smooth = [value**exponent if value > 0 else 0.0 for value in demand]
    if not any(smooth):
        smooth = [1.0] * n
    if sum(upper if value else lower for value in smooth) <= total:
        # Whoever has a demand is at the cap; the others share what is left alike.
        idle = [i for i in range(n) if not smooth[i]]
        left = total - upper * (n - len(idle))
        return round_to_total([left / len(idle) if i in idle else upper for i in range(n)], total)
    smallest, largest = 0.0, 1.0

    def shares(factor: float) -> list[float]:
        return [min(max(factor * value, lower), upper) for value in smooth]

    while sum(shares(largest)) < total:
        largest *= 2
    for _ in range(200):
        middle = (smallest + largest) / 2
        if sum(shares(middle)) < total:
            smallest = middle
        else:
            largest = middle
    return round_to_total(shares(largest), total)


def layer_budgets(rules: Rules, n_layers: int, entries: int, demand: list[float] | None) -> list[int]:
    """Entries per KV head of every layer."""
    if rules.layers == "wave":
        bounds = rules.layer_floor, rules.layer_cap, rules.protected
        return robustify(demand, n_layers * entries, rules.gamma, *bounds)
    if rules.layers == "pyramid":
        mean = entries - rules.protected
        last = mean / rules.pyramid_beta
        first = 2 * mean - last
        steps = max(n_layers - 1, 1)
        shares = [first + (last - first) * layer / steps for layer in range(n_layers)]
        if n_layers == 1:
            shares = [mean]
        return [rules.protected + share for share in round_to_total(shares, n_layers * mean)]
    return [entries] * n_layers


def contest(rules: Rules, scores: list[list[float]], total: int) -> tuple[list[list[float]], float]:
    """Put the scores of all heads on one scale; give them and the ``total``-th largest."""
    pooled = []
    for head in scores:
        n_evictable = sum(score != INFINITY for score in head)
        factor = n_evictable if rules.pooling == "length" else 1
        pooled.append([score if score == INFINITY else score * factor for score in head])
    ranking = sorted((score for head in pooled for score in head), reverse=True)
    return pooled, ranking[min(total, len(ranking)) - 1]


def head_budgets(rules: Rules, demand: list[float], total: int) -> list[int]:
    return robustify(demand, total, rules.beta, rules.mu, rules.head_cap, rules.protected)


# ---- scores -----------------------------------------------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def importance(queries: np.ndarray, keys: np.ndarray, scale: float, rules: Rules) -> list[float]:
    """Attention of the window's queries (group, window, head_dim) to the candidates' keys, pooled."""
    logits = (scale * np.einsum("gid,jd->gij", queries, keys)).tolist()
    group_size, n_rows, n = len(logits), len(logits[0]), len(keys)
    rows = []
    for i in range(n_rows):
        if rules.group_reduce == "max_logits":
            rows.append(softmax([max(logits[g][i][j] for g in range(group_size)) for j in range(n)]))
        else:
            weights = [softmax(logits[g][i]) for g in range(group_size)]
            reduce = max if rules.group_reduce == "max_weights" else lambda column: sum(column) / len(column)
            rows.append([reduce([weights[g][j] for g in range(group_size)]) for j in range(n)])
    mean = [sum(row[j] for row in rows) / n_rows for j in range(n)]
    half = rules.kernel_size // 2
    return [max(mean[max(j - half, 0) : j + half + 1]) for j in range(n)]


def cosines(keys: np.ndarray) -> np.ndarray:
    units = np.array([key / (math.sqrt(float(key @ key)) + 1e-8) for key in keys])
    return units @ units.T


def redundancy(keys: np.ndarray, rules: Rules) -> list[float]:
    """Softmax of every key's mean cosine to all, each row having spared its newest duplicate."""
    n = len(keys)
    similar = cosines(keys).tolist()
    for i in range(n):
        similar[i][i] = 0.0
        duplicates = [j for j in range(n) if similar[i][j] > rules.similarity_threshold]
        if duplicates:
            similar[i][duplicates[-1]] = 0.0
        elif rules.no_match == "column0":
            similar[i][0] = 0.0
    return softmax([sum(similar[i][j] for i in range(n)) / n for j in range(n)])


# ---- one layer --------------------------------------------------------------------------------------------


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
