"""Ranks and curves by counting: how well one list of numbers predicts another, in lists and loops."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np


def slow_ranks(values):
    """Average rank of each value: how many are below it, and half of those that equal it."""
    return [sum(v < own for v in values) + sum(v == own for v in values) / 2 for own in values]


def slow_spearman(x, y):
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    x, y = slow_ranks(x), slow_ranks(y)
    dx, dy = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    product = sum(a * b for a, b in zip(dx, dy, strict=True))
    return product / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


def slow_kendall(x, y):
    """Count pairs in the same and in the opposite order; pairs tied on one side shorten that side only."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    return sum(a * b for a, b in signs) / math.sqrt(
        sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
    )


def slow_regrets(x, y):
    best = max(range(len(x)), key=lambda i: (x[i], -i))
    return max(y) - y[best]


def slow_isotonic(x, y):
    """Pool neighbours for as long as one falls below the one before it; knots and heights."""
    blocks = []
    for value in sorted(set(x)):
        own = [b for a, b in zip(x, y, strict=True) if a == value]
        blocks.append([[value], sum(own), len(own)])
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] > blocks[-1][1] / blocks[-1][2]:
            knots, total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + knots, blocks[-1][1] + total, blocks[-1][2] + count]
    return [(knot, total / count) for knots, total, count in blocks for knot in knots]


def slow_curve(points, value):
    """Read a curve: straight between its points, flat beyond them."""
    if value <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if value <= x1:
            return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return points[-1][1]


def slow_quantile(values, share):
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])
