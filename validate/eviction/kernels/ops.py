"""The device operations of eviction: Triton's on a GPU, their twins in torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from traces.errors import NoDeviceError, UserError

# What the kernels are compiled for; other widths would need padding.
HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP_SIZE = 8


class Ops(NamedTuple):
    """One implementation of everything a compression and a decode step need; see ``eviction.device``."""

    attend: Callable[..., None]
    append: Callable[..., None]
    window_importance: Callable[..., None]
    redundancy: Callable[..., None]
    combine_scores: Callable[..., None]
    demand: Callable[..., None]
    select: Callable[..., None]
    compact: Callable[..., None]
    fill: Callable[..., None]


@cache
def torch_ops() -> Ops:
    """Give the twins, which run on any device."""
    from validate.eviction.kernels import twins, twins_scores

    return Ops(
        twins.attend,
        twins.append,
        twins_scores.window_importance,
        twins_scores.redundancy,
        twins_scores.combine_scores,
        twins.demand,
        twins.select,
        twins.compact,
        twins.fill,
    )


@cache
def triton_ops() -> Ops:
    """Give the Triton kernels.

    Raises
    ------
    NoDeviceError
        Without Triton.
    """
    try:
        from validate.eviction.kernels import (
            append,
            attention,
            compaction,
            importance,
            redundancy,
            scores,
            selection,
        )
    except ImportError as error:
        raise NoDeviceError(
            f"the GPU kernels need triton ({error}); allowed: pip install 'triton>=3.6', or --device cpu"
        ) from error
    return Ops(
        attention.attend,
        append.append,
        importance.window_importance,
        redundancy.redundancy,
        scores.combine_scores,
        selection.demand,
        selection.select,
        compaction.compact,
        compaction.fill,
    )


def ops_for(device: torch.device) -> Ops:
    """Give the operations of a device.

    Raises
    ------
    NoDeviceError
        For a GPU without Triton.
    """
    return triton_ops() if device.type == "cuda" else torch_ops()


def takes_heads(head_dim: int, group_size: int) -> bool:
    """Say whether the GPU kernels are made for heads of a width, so many query heads to a KV head."""
    return head_dim in HEAD_DIMS and group_size <= MAX_GROUP_SIZE


def require_shape(head_dim: int, group_size: int) -> None:
    """Refuse a model whose heads the kernels are not made for.

    Raises
    ------
    UserError
    """
    if head_dim not in HEAD_DIMS:
        allowed = ", ".join(map(str, HEAD_DIMS))
        raise UserError(f"head_dim is {head_dim}; the GPU kernels allow {allowed}; allowed: --device cpu")
    if group_size > MAX_GROUP_SIZE:
        raise UserError(
            f"{group_size} query heads share a KV head; the GPU kernels allow 1 to {MAX_GROUP_SIZE}; "
            "allowed: --device cpu"
        )
