"""The slow twin's policies: budgets and scores in float64, lists and loops, written from the papers alone."""

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
    recent_share: float = 0.5
    pool: str = "max"
    lag: int = 128
    score_source: str = "both"
    n_future: int = 512
    use_covariance: bool = True
    use_values: bool = True
    epsilon: float = 0.0
    first_stage_share: float = 0.5
    rate: float = 0.25
    decay: float = 0.8
    update: str = "max"
    large_share: float = 0.25
    sampled: bool = True
    # layer budgets
    pyramid_beta: float = 20.0
    gamma: float = 0.5
    layer_floor: float = 0.25
    layer_cap: float = 2.0
    code_beta: int = 20
    layer_delta: int = 128
    demand_window: int = 8
    rho: float = 0.93
    cake_window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0
    squeeze_share: float = 0.4
    layer_shares: str = ""
    # head budgets
    delta: int = 128
    beta: float = 0.5
    mu: float = 0.25
    head_cap: float = 2.0
    pooling: str = "none"
    form: str = "blend"
    uniform_share: float = 0.2
    head_table: str = ""
    head_beta: float = 1.01
    streaming_share: float = 0.5
    stream_budget: float = 0.25
    head_shares: str = ""
    # when
    buffer: int = 128
    interval: int = 128
    offset: int = 0
    segment: str = "newline"
    prompt: str = "compress"
    # What is never evicted, if not the sinks and recent entries above.
    protect: str = ""

    @property
    def protected(self) -> int:
        return self.sinks + self.recent


# Where a scorer's paper differs from the others.
SPECIAL = {
    "streamingllm": {"sinks": 4},
    "random": {"recent": 8},
    "random-prompt": {"recent": 8},
    "random-unified": {"recent": 8},
    "snapkv-paper": {"window": 32},
    "lagkv": {"sinks": 4},
    "expected-attention": {"window": 256, "sinks": 4},
    "vatp": {"sinks": 20},
    "criticalkv": {"window": 32, "epsilon": 1e-4},
    "gkv": {"window": 16, "alpha": 0.5},
    "vase": {"window": 64, "sinks": 4, "kernel_size": 5},
}
PROTECTS_ITS_WINDOW = ("snapkv", "rkv", "snapkv-paper", "criticalkv", "append-only", "gkv", "vase")


def read_rules(text: str) -> Rules:
    """Read ``scorer[+layers][+heads][:name=value,...]``."""
    name, _, tail = text.partition(":")
    name = {"reasonalloc": "rkv+wave+utility", "pyramid-rkv": "rkv+pyramid"}.get(name, name)
    scorer, *others = name.split("+")
    rules = replace(Rules(scorer=scorer), **SPECIAL.get(scorer, {}))
    layers_named = False
    for part in others:
        role = "heads" if layers_named or part in ("utility", "adakv", "headkv", "duo") else "layers"
        layers_named |= role == "layers"
        rules = replace(rules, **{role: part})
    kinds = {item.name: type(getattr(rules, item.name)) for item in fields(Rules)}
    for piece in filter(None, tail.split(",")):
        key, _, value = piece.partition("=")
        rules = replace(rules, **{key: value == "true" if kinds[key] is bool else kinds[key](value)})
    if scorer in PROTECTS_ITS_WINDOW:
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
    smooth = [value**exponent for value in demand]
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


def seen_softmax(logits: list[float], seen: list[bool]) -> list[float]:
    """Softmax over what is seen; zero elsewhere."""
    weights = softmax([logit for logit, is_seen in zip(logits, seen, strict=True) if is_seen] or [0.0])
    return [weights.pop(0) if is_seen else 0.0 for is_seen in seen]


def importance(
    queries: np.ndarray, keys: np.ndarray, scale: float, rules: Rules, seen: list[list[bool]]
) -> list[float]:
    """Attention of the window's queries (group, window, head_dim) to the candidates' keys, pooled.

    ``seen`` says which key each query sees; [query][key].
    """
    logits = (scale * np.einsum("gid,jd->gij", queries, keys)).tolist()
    group_size, n_rows, n = len(logits), len(logits[0]), len(keys)
    rows = []
    for i in range(n_rows):
        if rules.group_reduce == "max_logits":
            merged = [max(logits[g][i][j] for g in range(group_size)) for j in range(n)]
            rows.append(seen_softmax(merged, seen[i]))
        else:
            weights = [seen_softmax(logits[g][i], seen[i]) for g in range(group_size)]
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
