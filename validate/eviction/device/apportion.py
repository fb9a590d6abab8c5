"""Divide layers' budgets over their KV heads where the counts are: on the device, all rows at once."""

from __future__ import annotations

import torch


def divide_heads(
    demand: torch.Tensor,
    totals: torch.Tensor,
    *,
    exponent: float,
    floor: float,
    cap: float,
    protected: int,
) -> torch.Tensor:
    """Turn rows of raw demands into budgets, as ``simulator.policies.apportion.robustify`` does for one row.

    Parameters
    ----------
    demand : Tensor, shape (n_rows, n_heads), not negative
    totals : int64 Tensor, shape (n_rows,)
        What each row's budgets sum to; at least ``n_heads * protected``.
    exponent, floor, cap, protected
        As ``robustify``.

    Returns
    -------
    int32 Tensor, shape (n_rows, n_heads)

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), robustification operator.
    """
    n_heads = demand.shape[1]
    whole = totals.to(torch.int64)
    mean = whole.double() / n_heads
    lowest = torch.ceil(floor * mean - 1e-9).minimum((whole // n_heads).double()).clamp(min=protected)
    upwards = torch.div(whole + n_heads - 1, n_heads, rounding_mode="floor").double()
    highest = torch.floor(cap * mean + 1e-9).minimum(whole.double()).maximum(upwards)
    demand = demand.double()
    peak = demand.amax(1, keepdim=True)
    # Without any demand 0 / 0 stands there, and all heads are equal.
    relative = torch.where(peak > 0, (demand / peak).clamp(min=1e-9), 1.0)
    shares = _water_fill(relative**exponent, whole.double()[:, None], lowest[:, None], highest[:, None])
    return _apportion(shares, whole).to(torch.int32)


def _water_fill(
    demand: torch.Tensor, total: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Scale each row of ``demand`` by the one factor with which it meets ``total`` when clipped."""
    corners = torch.cat([torch.zeros_like(total), lower / demand, upper / demand], 1).sort(1).values
    scaled = corners[:, :, None] * demand[:, None, :]
    sums = scaled.clamp(lower[:, :, None], upper[:, :, None]).sum(2)
    last = corners.shape[1] - 1
    right = torch.searchsorted(sums, total)
    inner = right.clamp(1, last)
    from_corner, to_corner = corners.gather(1, inner - 1), corners.gather(1, inner)
    from_sum, to_sum = sums.gather(1, inner - 1), sums.gather(1, inner)
    step = (total - from_sum) / (to_sum - from_sum)
    factor = from_corner + step * (to_corner - from_corner)
    factor = torch.where(right == 0, corners[:, :1], factor)
    factor = torch.where(right > last, corners[:, last:], factor)
    return (factor * demand).clamp(lower, upper)


def _apportion(shares: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Round by largest remainder, ties to the lower head, as ``simulator.policies.apportion.divide`` does."""
    shares = torch.round(shares * 2**20) / 2**20
    floors = torch.floor(shares + 1e-9)
    missing = totals - floors.sum(1).to(torch.int64)
    order = torch.argsort(floors - shares, dim=1, stable=True)
    rank = torch.argsort(order, dim=1)
    return floors.to(torch.int64) + (rank < missing[:, None])
