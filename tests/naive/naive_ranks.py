"""Ranks by counting: how well one list of numbers predicts another, in lists and loops."""

from __future__ import annotations

import math
from itertools import combinations

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
