"""The slow twin's other budgets, one paper after the other: float64, loops, nothing from the simulator.

A layer is the twin's `naive.Layer`: what its heads hold, their budgets, and all queries and keys ever.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import naive_rules
import naive_scorers
from naive_rules import INFINITY, Rules, robustify, round_to_total

DYNAMIC = ("wave-dynamic", "cake")
# Decode steps between two divisions of a layer's budget over its heads.
STATIC = ("headkv", "duo", "custom")


def as_budgeted(rules: Rules, prompt_tokens: int, entries: int) -> Rules:
    """The rules as a budget sees them: all that is protected is sinks or recent entries."""
    first, last = (0, 0) if rules.protect else (rules.sinks, rules.recent)
    for name, _, amount in (piece.partition(":") for piece in rules.protect.split("+")):
        if name == "prompt":
            first = max(first, prompt_tokens)
        elif name == "sinks":
            first = max(first, int(amount))
        elif name == "recent":
            last = max(last, int(amount))
        elif name == "boundary":
            either = math.floor(Fraction(amount.rstrip("%")) / 100 * entries)
            first, last = max(first, either), max(last, either)
    if rules.prompt == "keep":
        first = max(first, prompt_tokens)
    return replace(rules, sinks=first, recent=last)


def numbers_of(text: str) -> list:
    """Read 4/2/1, or a JSON file."""
    if all(piece.replace(".", "").isdigit() for piece in text.split("/")):
        return [float(piece) for piece in text.split("/")]
    return json.loads(Path(text).read_text())


# ---- layers -----------------------------------------------------------------------------------------------


def layer_budgets(rules: Rules, n_layers: int, entries: int, demand, n_kv_heads: int = 1) -> list[int]:
    """Entries per KV head of every layer; those that move start out equal."""
    total, protected = n_layers * entries, rules.protected
    if rules.layers == "pyramid-code":
        mean = entries - protected
        last = mean // rules.code_beta
        first = 2 * mean - last
        step = (first - last) // max(n_layers - 1, 1)
        return [protected + (first - step * i if n_layers > 1 else mean) for i in range(n_layers)]
    if rules.layers == "squeeze":
        low = lower_cluster(demand)
        small = max(protected, rules.squeeze_share * entries)
        large = (total - small * len(low)) / (n_layers - len(low))
        return round_to_total([small if i in low else large for i in range(n_layers)], total)
    if rules.layers == "table":
        table = head_table(rules, demand, n_layers, n_kv_heads)
        evictable = n_layers * (entries - protected)
        shares = round_to_total(pooled_shares(rules, [sum(row) for row in table], evictable), evictable)
        return [protected + share for share in shares]
    if rules.layers == "custom":
        return in_proportion(numbers_of(rules.layer_shares), total, protected)
    if rules.layers in DYNAMIC:
        return [entries] * n_layers
    return naive_rules.layer_budgets(rules, n_layers, entries, demand)


def in_proportion(weights: list[float], total: int, protected: int) -> list[int]:
    return robustify(weights, total, 1, 0, len(weights), protected)


def lower_cluster(demand: list[float]) -> set[int]:
    """Indices of the lower group of the split with the least variance within both."""

    def spread(group):
        mean = sum(group) / len(group)
        return sum((value - mean) ** 2 for value in group)

    splits = []
    for highest in sorted(set(demand))[:-1]:
        low = [value for value in demand if value <= highest]
        high = [value for value in demand if value > highest]
        splits.append((spread(low) + spread(high), highest))
    if not splits:
        return set()
    least = min(splits)[0]
    highest = min(top for within, top in splits if within <= least + 1e-9 * spread(demand))
    return {i for i, value in enumerate(demand) if value <= highest}


def pooled_shares(rules: Rules, weights: list[float], total: int) -> list[float]:
    n, whole = len(weights), sum(weights)
    parts = [weight / whole for weight in weights] if whole else [1 / n] * n
    minimum = total / n * (1 - 1 / rules.head_beta)
    return [minimum + part * (total - n * minimum) for part in parts]


def measured_layer_budgets(rules: Rules, layers: list, entries: int):
    """Divide by what the layers hold now; the budgets, and who says whether others are a near-tie of them."""
    total, protected = len(layers) * entries, rules.protected
    if rules.layers == "wave-dynamic":

        def budgets(rho):
            demand = [demand_of(layer, rules.demand_window, rho) for layer in layers]
            return robustify(demand, total, rules.gamma, rules.layer_floor, rules.layer_cap, protected)

        def near(seen):
            return seen in (budgets(rules.rho * (1 - 1e-6)), budgets(rules.rho * (1 + 1e-6)))

        return budgets(rules.rho), near
    evictable = total - len(layers) * protected
    preferences = [preference_of(layer, rules) for layer in layers]
    whole = math.fsum(preferences)
    shares = [evictable * (p / whole if whole else 1 / len(layers)) for p in preferences]
    own = round_to_total(shares, evictable)

    def near(seen):
        moved = [
            share - math.floor(share)
            for share, before, after in zip(shares, own, seen, strict=True)
            if before != after - protected
        ]
        return max(moved) - min(moved) < 1e-4

    return [protected + share for share in own], near


def demand_of(layer, window: int, rho: float) -> float:
    counts = []
    for kv_head in range(layer.n_kv_heads):
        for row in naive_scorers.mean_attention(layer, kv_head, max(0, layer.n_tokens - window)):
            held, count = 0.0, 0
            for weight in sorted(row, reverse=True):
                if held >= rho:
                    break
                held += weight
                count += 1
            counts.append(count)
    return sum(counts) / len(counts)


def preference_of(layer, rules: Rules) -> float:
    """Entropy of the mean attention, times its variance over queries; CAKE."""
    entropies, variances = [], []
    for kv_head in range(layer.n_kv_heads):
        first = max(0, layer.n_tokens - rules.cake_window)
        for rows in naive_scorers.attention_rows(layer, kv_head, first):
            columns = list(zip(*rows, strict=True))
            means = [sum(column) / len(rows) for column in columns]
            entropies.append(-sum(mean * math.log(mean) for mean in means if mean > 0))
            variances.append(
                sum(
                    sum((weight - mean) ** 2 for weight in column) / len(rows)
                    for column, mean in zip(columns, means, strict=True)
                )
            )
    spread = max(0.0, sum(entropies) / len(entropies))
    return spread ** (1 / rules.tau1) * (sum(variances) / len(variances)) ** (1 / rules.tau2)


# ---- heads ------------------------------------------------------------------------------------------------


def head_table(rules: Rules, demand, n_layers: int, n_kv_heads: int) -> list[list[float]]:
    if not rules.head_table:
        return [[float(value)] * n_kv_heads for value in demand]
    found = json.loads(Path(rules.head_table).read_text())
    if isinstance(found, list):
        return found
    group_size = len(found) // n_layers // n_kv_heads
    table = [[0.0] * n_kv_heads for _ in range(n_layers)]
    for name, scores in found.items():
        layer, head = map(int, name.split("-"))
        table[layer][head // group_size] += sum(scores) / len(scores)
    return table


def head_rows(rules: Rules, demand, n_layers: int, n_kv_heads: int) -> list:
    """What a static allocator knows of every layer's heads."""
    if rules.heads == "custom":
        numbers = numbers_of(rules.head_shares)
        return numbers if isinstance(numbers[0], list) else [numbers] * n_layers
    if rules.heads not in STATIC:
        return [None] * n_layers
    table = head_table(rules, demand, n_layers, n_kv_heads)
    if rules.heads == "headkv":
        return table
    everyone = [(layer, head) for layer in range(n_layers) for head in range(n_kv_heads)]
    lowest_first = sorted(everyone, key=lambda place: (table[place[0]][place[1]], -place[0], -place[1]))
    streaming = lowest_first[: math.floor(rules.streaming_share * len(everyone) + 0.5)]
    return [[(layer, head) not in streaming for head in range(n_kv_heads)] for layer in range(n_layers)]


def divides_heads(layer) -> bool:
    """Whether a compression now divides the layer's budget over its heads anew."""
    rules, last = layer.rules, layer.reallocated
    if rules.heads == "uniform":
        return False
    if last is None:
        return True
    if rules.heads in STATIC:
        return False
    return rules.heads == "adakv" or layer.n_tokens - last >= rules.delta


def divide_heads(layer, scores: list[list[float]]):
    """Head budgets, and the contest that they come from: its scores and the last place's."""
    rules, total, n = layer.budgeted, layer.total, layer.n_kv_heads
    protected, evictable = rules.protected, total - n * rules.protected
    if rules.heads == "utility":
        pooled, tau = naive_rules.contest(rules, scores, total)
        demand = [sum(score >= tau for score in head) for head in pooled]
        return naive_rules.head_budgets(rules, demand, total), pooled, tau
    if rules.heads == "custom":
        return in_proportion(layer.table, total, protected), scores, INFINITY
    if rules.heads == "duo":
        n_streaming = n - sum(layer.table)
        small, large = total / n, total / n
        if 0 < n_streaming < n:
            small = max(protected, rules.stream_budget * total / n)
            large = (total - n_streaming * small) / (n - n_streaming)
        shares = [large if is_retrieval else small for is_retrieval in layer.table]
        return round_to_total(shares, total), scores, INFINITY
    if rules.heads == "headkv":
        shares = pooled_shares(rules, layer.table, evictable)
    else:
        safe, pooled, n_places = competitors(rules, scores, evictable)
        winners, tau = winners_of(pooled, n_places)
        shares = adakv_shares(rules, safe, winners, evictable)
    budgets = [protected + share for share in round_to_total(shares, evictable)]
    return (budgets, scores, INFINITY) if rules.heads == "headkv" else (budgets, pooled, tau)


def competitors(rules: Rules, scores: list[list[float]], evictable: int):
    """How many entries of every head are safe, the scores of the others, and the places left for these."""
    finite = [[score for score in head if score != INFINITY] for head in scores]
    equal = evictable / len(scores)
    n_safe = 0
    if rules.form == "floor" and rules.uniform_share > 0:
        n_safe = min(max(1, math.floor(rules.uniform_share * equal)), math.floor(equal))
    safe = [min(n_safe, len(head)) for head in finite]
    others = [sorted(head, reverse=True)[n:] for head, n in zip(finite, safe, strict=True)]
    return safe, others, evictable - sum(safe)


def winners_of(pooled: list[list[float]], n_places: int):
    """How many of each head's scores are among the best, ties at the last place in parts; and that score."""
    n = len(pooled)
    ranking = sorted((score for head in pooled for score in head), reverse=True)
    if n_places >= len(ranking):
        return [len(head) + (n_places - len(ranking)) / n for head in pooled], -INFINITY
    if n_places == 0:
        return [0] * n, INFINITY
    tau = ranking[n_places - 1]
    above = [sum(score > tau for score in head) for head in pooled]
    tied = [sum(score == tau for score in head) for head in pooled]
    left = n_places - sum(above)
    return [a + left * t / sum(tied) for a, t in zip(above, tied, strict=True)], tau


def adakv_shares(rules: Rules, safe, winners, evictable: int) -> list[float]:
    if rules.form == "floor":
        return [s + w for s, w in zip(safe, winners, strict=True)]
    uniform = rules.uniform_share * evictable / len(winners)
    return [(1 - rules.uniform_share) * w + uniform for w in winners]


def adakv_within(layer, seen: list[int], fewest: list[int], most: list[int]) -> bool:
    """Whether head budgets lie between those that the fewest and the most winners would give."""
    rules = layer.budgeted
    evictable = layer.total - layer.n_kv_heads * rules.protected
    equal = evictable / layer.n_kv_heads
    # Of the heads' safe entries only how many there are matters.
    is_floor = rules.form == "floor" and rules.uniform_share > 0
    n_safe = min(max(1, math.floor(rules.uniform_share * equal)), math.floor(equal)) if is_floor else 0
    lows = adakv_shares(rules, [0] * len(seen), fewest, evictable)
    highs = adakv_shares(rules, [n_safe] * len(seen), most, evictable)
    return all(
        math.floor(low) <= budget - rules.protected <= math.ceil(high)
        for budget, low, high in zip(seen, lows, highs, strict=True)
    )
