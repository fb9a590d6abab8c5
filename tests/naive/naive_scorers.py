"""The slow twin's scorers, one paper after the other: float64, loops, nothing from the simulator.

A layer is the twin's `naive.Layer`: what its heads hold, and all queries, keys and values ever.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from naive_rules import INFINITY, redundancy, seen_softmax, softmax

PER_HEAD = {}


def paper(*names):
    """Name the scorers that a function is the rule of."""

    def register(rule):
        PER_HEAD.update(dict.fromkeys(names, rule))
        return rule

    return register


def attention_rows(layer, kv_head, first) -> list[list[list[float]]]:
    """Softmax of every query since ``first`` over the held entries it can see; [group][row][slot]."""
    positions = layer.heads[kv_head].positions
    keys = layer.held_keys(kv_head)
    group = []
    for query_head in range(kv_head * layer.group_size, (kv_head + 1) * layer.group_size):
        rows = []
        for row in range(first, layer.n_tokens):
            logits = layer.scale * np.einsum("d,jd->j", layer.queries[query_head, row], keys)
            seen = [j for j, position in enumerate(positions) if position <= row]
            weights = softmax([float(logits[j]) for j in seen])
            spread = [0.0] * len(positions)
            for j, weight in zip(seen, weights, strict=True):
                spread[j] = weight
            rows.append(spread)
        group.append(rows)
    return group


def mean_attention(layer, kv_head, first) -> list[list[float]]:
    """The same, mean over the group; [row][slot]."""
    group = attention_rows(layer, kv_head, first)
    return [
        [sum(column) / len(group) for column in zip(*rows, strict=True)] for rows in zip(*group, strict=True)
    ]


def lift(scores, chosen) -> list[float]:
    """Put the chosen slots one above the best."""
    top = max(scores) + 1
    return [top if is_chosen else score for score, is_chosen in zip(scores, chosen, strict=True)]


def held_values(layer, kv_head) -> list[list[float]]:
    return layer.values[kv_head][layer.heads[kv_head].positions].tolist()


def sizes(layer, kv_head) -> list[float]:
    """L1 norms of the held values."""
    return [sum(abs(x) for x in value) for value in held_values(layer, kv_head)]


# ---- accumulated attention --------------------------------------------------------------------------------


def observe(layer) -> None:
    """Add what was paid to every position since the last compression to what it had before."""
    for kv_head, head in enumerate(layer.heads):
        noted = layer.noted[kv_head]
        rows = mean_attention(layer, kv_head, layer.since)
        for slot, position in enumerate(head.positions):
            noted[position] = noted.get(position, 0.0) + math.fsum(row[slot] for row in rows)


@paper("h2o", "vatp")
def heavy_hitters(layer, kv_head) -> list[float]:
    head = layer.heads[kv_head]
    scores = [layer.noted[kv_head][position] for position in head.positions]
    if layer.rules.scorer == "vatp":
        scores = [score * size for score, size in zip(scores, sizes(layer, kv_head), strict=True)]
    n_recent = math.floor(layer.rules.recent_share * head.budget)
    newest = sorted(head.positions)[len(head.positions) - min(n_recent, len(head.positions)) :]
    return lift(scores, [position in newest for position in head.positions])


# ---- attention of the last queries ------------------------------------------------------------------------


@paper("tova")
def tova(layer, kv_head) -> list[float]:
    paid: dict[int, float] = {}
    for other, head in enumerate(layer.heads):
        for rows in attention_rows(layer, other, layer.n_tokens - 1):
            for position, weight in zip(head.positions, rows[-1], strict=True):
                paid[position] = paid.get(position, 0.0) + weight
    return [paid[position] / len(layer.queries) for position in layer.heads[kv_head].positions]


@paper("snapkv-paper")
def snapkv_paper(layer, kv_head) -> list[float]:
    rules, n = layer.rules, len(layer.heads[kv_head].positions)
    n_candidates = n - layer.n_left_out
    if n_candidates == 0:
        return [0.0] * n
    rows = mean_attention(layer, kv_head, max(0, layer.n_tokens - rules.window))
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(n_candidates)]
    half, pooled = rules.kernel_size // 2, []
    for j in range(n_candidates):
        neighbours = mean[max(j - half, 0) : j + half + 1]
        pooled.append(max(neighbours) if rules.pool == "max" else math.fsum(neighbours) / rules.kernel_size)
    return pooled + [0.0] * (n - n_candidates)


def first_stage(layer, kv_head) -> tuple[list[float], list[int]]:
    """CriticalKV's base scores, and the positions that its first stage keeps, best first."""
    head = layer.heads[kv_head]
    base = snapkv_paper(layer, kv_head)
    in_window = [position >= layer.n_tokens - layer.n_left_out for position in head.positions]
    ranked = sorted(zip(in_window, base, head.positions, strict=True), reverse=True)
    n_first = max(1, math.floor(layer.rules.first_stage_share * head.budget))
    return base, [position for _, _, position in ranked[:n_first]]


@paper("criticalkv")
def criticalkv(layer, kv_head) -> list[float]:
    base, first = first_stage(layer, kv_head)
    second = [
        (score + layer.rules.epsilon) * size for score, size in zip(base, sizes(layer, kv_head), strict=True)
    ]
    return lift(second, [position in first for position in layer.heads[kv_head].positions])


@paper("append-only")
def append_only(layer, kv_head) -> list[float]:
    positions, attention = layer.heads[kv_head].positions, layer.window_attention(kv_head)
    scores = attention + [0.0] * (len(positions) - len(attention))
    # Judged at an earlier compression: it was no longer protected by then.
    return lift(scores, [position + layer.budgeted.recent < layer.since for position in positions])


@paper("gkv")
def gkv(layer, kv_head) -> list[float]:
    rules, noted, positions = layer.rules, layer.noted[kv_head], layer.heads[kv_head].positions
    n = len(positions) - layer.n_left_out
    if n < 1:
        return [0.0] * len(positions)
    group = attention_rows(layer, kv_head, max(0, layer.n_tokens - rules.window))
    rows = [[max(column) for column in zip(*rows, strict=True)] for rows in zip(*group, strict=True)]
    now = [math.fsum(row[j] for row in rows) / len(rows) for j in range(n)]
    largest = max(now)
    repeated = redundancy(layer.held_keys(kv_head), rules)[:n]
    scores = [0.0] * len(positions)
    for j, position in enumerate(positions[:n]):
        new = now[j] / largest if largest else 0.0
        # In the window of the last compression, or not there: not scored before.
        if position < layer.since - layer.budgeted.recent:
            old = rules.decay * noted[position]
            new = {"max": max(old, new), "sum": old + new, "mean": old + (1 - rules.decay) * new}[
                rules.update
            ]
        noted[position] = new
        scores[j] = rules.alpha * new - (1 - rules.alpha) * repeated[j] / max(repeated)
    return scores


@paper("vase")
def vase(layer, kv_head) -> list[float]:
    rules, head = layer.rules, layer.heads[kv_head]
    positions, n = head.positions, len(head.positions) - layer.n_left_out
    if n < 1:
        return [0.0] * len(positions)
    keys, paid = layer.held_keys(kv_head)[:n], [0.0] * n
    rows = range(max(0, layer.n_tokens - rules.window), layer.n_tokens)
    for query_head in range(kv_head * layer.group_size, (kv_head + 1) * layer.group_size):
        for row in rows:
            logits = (layer.scale * (keys @ layer.queries[query_head, row])).tolist()
            seen = [position <= row for position in positions[:n]]
            for j, weight in enumerate(seen_softmax(logits, seen)):
                paid[j] += weight / (len(rows) * layer.group_size)
    half, worth = rules.kernel_size // 2, []
    for j in range(n):
        mean = math.fsum(paid[max(j - half, 0) : j + half + 1]) / rules.kernel_size
        worth.append(math.log(max(mean, 1.1754943508222875e-38)))
    if rules.sampled:
        rng = np.random.default_rng([layer.seed, layer.index, kv_head, layer.n_tokens])
        noise = rng.gumbel(size=len(positions)).tolist()
        worth = [own + noise[j] for j, own in enumerate(worth)]
    values = held_values(layer, kv_head)
    ranges = [
        (INFINITY if position < layer.budgeted.sinks else max(values[j]) - min(values[j]), position, j)
        for j, position in enumerate(positions[:n])
    ]
    large = [j for _, _, j in sorted(ranges, reverse=True)[: math.floor(rules.large_share * head.budget)]]
    top = max(worth)
    for rank, j in enumerate(large):
        worth[j] = top + len(large) - rank
    return worth + [0.0] * (len(positions) - n)


# ---- keys and values alone --------------------------------------------------------------------------------


@paper("recency")
def recency(layer, kv_head) -> list[float]:
    return [float(position) for position in layer.heads[kv_head].positions]


@paper("knorm")
def knorm(layer, kv_head) -> list[float]:
    return [-math.sqrt(math.fsum(x * x for x in key)) for key in layer.held_keys(kv_head).tolist()]


@paper("keydiff")
def keydiff(layer, kv_head) -> list[float]:
    keys = layer.held_keys(kv_head).tolist()

    def unit(vector, least):
        norm = max(math.sqrt(math.fsum(x * x for x in vector)), least)
        return [x / norm for x in vector]

    units = [unit(key, 1e-12) for key in keys]
    anchor = [math.fsum(column) / len(keys) for column in zip(*units, strict=True)]
    anchor = unit(anchor, 1e-8)
    cosines = [math.fsum(x * y for x, y in zip(unit(key, 1e-8), anchor, strict=True)) for key in keys]
    # Two keys are equally far from their mean: a tie, but for the last digits.
    return [-round(cosine, 12) for cosine in cosines]


def lag_spreads(layer, kv_head) -> list[list[float]]:
    """Every partition's scores before they are ranked, but for the last partition; [partition][entry]."""
    rules, found = layer.rules, []
    sources = [layer.held_keys(kv_head).tolist()]
    if rules.score_source == "both":
        sources.append(held_values(layer, kv_head))
    for states in sources:
        states = states[layer.n_scored_sinks :]
        partitions = [states[i : i + rules.lag] for i in range(0, len(states) - rules.lag + 1, rules.lag)]
        own = []
        for partition, following in pairwise(partitions):
            low, high = ([f(column) for column in zip(*following, strict=True)] for f in (min, max))
            spreads = []
            for entry in partition:
                relative = [
                    (x - a) / (b - a) if b > a else 0.0 for x, a, b in zip(entry, low, high, strict=True)
                ]
                mean = math.fsum(relative) / len(relative)
                spreads.append(math.sqrt(math.fsum((x - mean) ** 2 for x in relative) / (len(relative) - 1)))
            # Channels in another order have the same spread, but for the last digits.
            own.append([round(share, 12) for share in softmax(spreads)])
        found.append(own)
    return [
        [sum(shares) / len(found) for shares in zip(*rows, strict=True)] for rows in zip(*found, strict=True)
    ]


@paper("lagkv")
def lagkv(layer, kv_head) -> list[float]:
    rules, n = layer.rules, len(layer.heads[kv_head].positions)
    sinks = layer.n_scored_sinks
    if n < sinks + 2 * rules.lag:
        ramp = max(n - sinks, 0)
        return [1.0] * (n - ramp) + [j / ramp for j in range(ramp)]
    ranks = []
    for spreads in lag_spreads(layer, kv_head):
        ascending = sorted(range(rules.lag), key=lambda j: (spreads[j], j))
        ranks += [ascending.index(j) / rules.lag for j in range(rules.lag)]
    return [1.0] * sinks + ranks + [1.0] * (n - sinks - len(ranks))


# ---- queries yet to come ----------------------------------------------------------------------------------


def turned(vector, position, theta) -> np.ndarray:
    """RoPE, pair by pair."""
    n = len(vector) // 2
    out = np.array(vector, np.float64)
    for i in range(n):
        angle = position * theta ** (-i / n)
        x, y = float(vector[i]), float(vector[i + n])
        out[i] = x * math.cos(angle) - y * math.sin(angle)
        out[i + n] = y * math.cos(angle) + x * math.sin(angle)
    return out


@paper("expected-attention")
def expected_attention(layer, kv_head) -> list[float]:
    rules, positions, theta = layer.rules, layer.heads[kv_head].positions, layer.rope_theta
    window = range(max(0, layer.n_tokens - rules.window), layer.n_tokens)
    observed = [t for t in window if t >= rules.sinks] or list(window)
    scored = [j for j, position in enumerate(positions) if position >= layer.n_scored_sinks]
    keys = layer.held_keys(kv_head)[scored]
    head_dim = keys.shape[-1]
    ahead = range(layer.n_tokens, layer.n_tokens + rules.n_future)
    columns = [sum(turned(unit, t, theta) for t in ahead) / rules.n_future for unit in np.eye(head_dim)]
    rotation = np.array(columns).T
    expected = [0.0] * len(scored)
    for query_head in range(kv_head * layer.group_size, (kv_head + 1) * layer.group_size):
        queries = np.array([turned(layer.queries[query_head, t], -t, theta) for t in observed])
        mean = queries.mean(axis=0)
        covariance = sum(np.outer(query - mean, query - mean) for query in queries) / len(queries)
        mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
        logits = []
        for key in keys:
            variance = float(key @ covariance @ key) if rules.use_covariance else 0.0
            logits.append(layer.scale * float(key @ mean) + layer.scale**2 * variance / 2)
        for j, weight in enumerate(softmax(logits) if logits else []):
            expected[j] += weight / layer.group_size
    if rules.use_values:
        values = held_values(layer, kv_head)
        norms = [math.sqrt(math.fsum(x * x for x in values[j])) for j in scored]
        expected = [(score + rules.epsilon) * norm for score, norm in zip(expected, norms, strict=True)]
    scores = [0.0] * len(positions)
    for j, score in zip(scored, expected, strict=True):
        scores[j] = score
    return scores
