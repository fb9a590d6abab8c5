"""Whole numbers that follow a demand, keep their bounds and meet their total exactly."""

from __future__ import annotations

import numpy as np

from traces.errors import InfeasibleBudgetError


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Round non-negative real shares that sum to ``total`` by largest remainder, ties to the lower index.

    Parameters
    ----------
    shares : float64 (n,)
    total : int

    Returns
    -------
    int64 (n,), summing to ``total``.
    """
    # A share a rounding error below a whole number is that whole number.
    floors = np.floor(shares + 1e-9).astype(np.int64)
    missing = total - int(floors.sum())
    order = np.argsort(-(shares - floors), kind="stable")
    floors[order[:missing]] += 1
    return floors


def divide(shares: np.ndarray, total: int) -> np.ndarray:
    """Apportion shares of which some are equal in truth and differ by the rounding errors of their making.

    Parameters and what is returned are those of ``apportion``.
    """
    # On a grid of powers of two remainders are exact, so that what is equal is a tie.
    return apportion(np.round(shares * 2**20) / 2**20, total)


def fractions(weights: np.ndarray) -> np.ndarray:
    """Give each weight's fraction of their sum; all zero counts as equal.

    Parameters
    ----------
    weights : float64 (n,), finite and not negative

    Returns
    -------
    float64 (n,), summing to 1.
    """
    peak = weights.max()
    # Relative to the largest, so that neither very large nor very small weights leave the range of a float.
    relative = weights / peak if peak > 0 else np.ones(len(weights))
    return relative / relative.sum()


def water_fill(demand: np.ndarray, total: float, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Find ``clip(c * demand, lower, upper)`` with the one factor c that makes it sum to ``total``.

    Parameters
    ----------
    demand : float64 (n,), positive
    total : float
        Between ``lower.sum()`` and ``upper.sum()``.
    lower, upper : float64 (n,)
    """
    # The sum is piecewise linear in c, with corners where an element enters or leaves its bounds.
    corners = np.unique(np.concatenate([[0.0], lower / demand, upper / demand]))
    sums = np.clip(corners[:, None] * demand, lower, upper).sum(axis=1)
    right = int(np.searchsorted(sums, total))
    if right == 0:
        factor = corners[0]
    elif right == len(corners):
        factor = corners[-1]
    else:
        left = right - 1
        step = (total - sums[left]) / (sums[right] - sums[left])
        factor = corners[left] + step * (corners[right] - corners[left])
    return np.clip(factor * demand, lower, upper)


def robustify(
    demand: np.ndarray,
    total: int,
    *,
    exponent: float,
    floor: float,
    cap: float,
    protected: int,
) -> tuple[np.ndarray, bool]:
    """Turn raw demands into budgets: smooth, scale to the mean, clip, meet the total, round.

    Parameters
    ----------
    demand : float64 (n,)
        Raw demand, not negative; all zero counts as equal.
    total : int
        What the budgets must sum to.
    exponent : float
        Smoothing: budgets follow ``demand ** exponent``.
    floor, cap : float
        Bounds as multiples of the mean budget. A bound that is not whole is rounded inwards, yet never past
        the mean.
    protected : int
        Entries of each element that cannot be evicted; a second lower bound.

    Returns
    -------
    budgets : int64 (n,), summing to ``total``
    binding : bool
        Whether ``protected`` lies above the floor and some element sits on it.

    Raises
    ------
    InfeasibleBudgetError
        If the bounds leave no way to meet the total.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), robustification operator. The clipped budgets are rescaled by water
    filling, so that the bounds still hold where the total is met.
    """
    n = len(demand)
    mean = total / n
    lowest = max(min(int(np.ceil(floor * mean - 1e-9)), total // n), protected)
    highest = max(int(min(np.floor(cap * mean + 1e-9), total)), -(-total // n))
    if n * lowest > total:
        raise InfeasibleBudgetError(
            f"a total budget of {total} entries cannot give each of {n} heads or layers its {lowest} "
            f"protected entries; allowed: at least {n * lowest}"
        )
    if not np.isfinite(demand).all() or (demand < 0).any():
        raise ValueError("demand must be finite and not negative")
    peak = demand.max(initial=0.0)
    # The smallest positive share lets an element without demand grow once all others are at their cap.
    relative = np.maximum(demand / peak, 1e-9) if peak > 0 else np.ones(n)
    bounds = np.full(n, float(lowest)), np.full(n, float(highest))
    budgets = divide(water_fill(relative**exponent, total, *bounds), total)
    binding = protected > floor * mean and bool((budgets == protected).any())
    return budgets, binding


def in_proportion(shares: np.ndarray, total: int, protected: int) -> tuple[np.ndarray, bool]:
    """Divide a total in proportion, with no bounds but the protected entries."""
    return robustify(shares, total, exponent=1, floor=0, cap=len(shares), protected=protected)


def pooled_shares(weights: np.ndarray, total: int, head_beta: float) -> np.ndarray:
    """Give each an equal minimum, ``1 - 1 / head_beta`` of the mean, and the rest by weight; float64 (n,)."""
    minimum = total / len(weights) * (1 - 1 / head_beta)
    return minimum + fractions(weights) * (total / head_beta)
