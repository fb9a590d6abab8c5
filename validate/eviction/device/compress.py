"""Decide on the device who stays: score, divide the layers' budgets over heads, select, move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from simulator.policies.heads.utility import UtilityHeads
from simulator.policies.language import Policy
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from validate.eviction.device.apportion import divide_heads
from validate.eviction.device.pool import DevicePool
from validate.eviction.kernels.ops import Ops

# Slots of the layers that are compressed by the same launches; bounds what their scores take.
_SLOTS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Due:
    """Which layers of which sequences are compressed now, of some neighbouring layers.

    Attributes
    ----------
    layers, rows : int64 (n_due,)
        In order of layers.
    totals : int64 (n_due,)
        Their budgets in entries over all KV heads.
    divide : bool (n_due,)
        Whose heads are divided anew.
    at : tuple of int64 Tensor, shape (n_due,)
        Layers and rows once more, as an index on the device.
    """

    layers: np.ndarray
    rows: np.ndarray
    totals: np.ndarray
    divide: np.ndarray
    at: tuple[torch.Tensor, torch.Tensor]


class Segments(NamedTuple):
    """What KV heads hold, each in slots that stand side by side.

    Attributes
    ----------
    starts : int64 Tensor, shape (n_segments,)
    lengths : int32 Tensor, shape (n_segments,)
    """

    starts: torch.Tensor
    lengths: torch.Tensor


def in_blocks(due: np.ndarray, pool: DevicePool) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Split what is due, bool (n_layers, n_rows), into blocks of layers small enough to score at once.

    Yields
    ------
    slots : slice
        Those of a block's layers.
    layers, rows : int64 (n_due,)
        What is due of it, at least one.
    """
    first = 0
    while first < len(due):
        stop = first + 1
        slots = pool.layers(first, stop)
        while stop < len(due) and pool.layers(first, stop + 1).stop - slots.start <= _SLOTS_AT_ONCE:
            stop += 1
        layers, rows = np.nonzero(due[first:stop])
        if len(layers):
            yield pool.layers(first, stop), layers + first, rows
        first = stop


class DeviceCompressor:
    """A policy at work on a device, in all layers of a batch.

    Parameters
    ----------
    policy : Policy
        One that ``unsupported_part`` has nothing against.
    ops : Ops
    entries : int64 (n_layers, n_rows)
        Budgets per KV head.
    n_kv_heads : int
    scale : float
        Attention scale.
    device : torch.device
    """

    def __init__(
        self,
        policy: Policy,
        ops: Ops,
        entries: np.ndarray,
        n_kv_heads: int,
        scale: float,
        device: torch.device,
    ) -> None:
        self.policy, self.ops, self.scale, self.device = policy, ops, scale, device
        self.n_kv_heads = n_kv_heads
        equal = torch.from_numpy(entries.astype(np.int32)).to(device)
        self.budgets = equal[:, :, None].expand(*equal.shape, n_kv_heads).contiguous()

    def keep_rows(self, index: torch.Tensor) -> None:
        """Forget all other rows."""
        self.budgets = self.budgets[:, index].contiguous()

    def decide(
        self, keys: torch.Tensor, held: Segments, queries: torch.Tensor, due: Due, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose who stays of what is due.

        Parameters
        ----------
        keys : Tensor, shape (n_slots, head_dim)
        held : Segments
            What every KV head of what is due holds.
        queries : Tensor, shape (n_due, n_query_heads, window, head_dim)
            The last queries, in any order.
        due : Due
        longest : int
            At least the largest length.

        Returns
        -------
        survivors : int32 Tensor, shape (n_slots,)
            From each segment's start on, its surviving entries by number.
        kept : int32 Tensor, shape (n_due, n_kv_heads)
        """
        scores = self._scores(keys, held, queries, longest)
        if due.divide.any():
            self._divide(scores, held, due, longest)
        quotas = self.budgets[due.at].reshape(-1)
        survivors = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        kept = torch.empty_like(held.lengths)
        self.ops.select(scores, *held, quotas, survivors, kept, longest=longest)
        return survivors, kept.view(-1, self.n_kv_heads)

    def _scores(
        self, keys: torch.Tensor, held: Segments, queries: torch.Tensor, longest: int
    ) -> torch.Tensor:
        scorer = self.policy.scorer
        assert isinstance(scorer, SnapKV | RKV)
        sizes: dict[str, Any] = {"window": scorer.window, "longest": longest}
        grouped = queries.reshape(len(held.starts), -1, *queries.shape[2:])
        importance, scores = (torch.empty(len(keys), device=self.device) for _ in range(2))
        self.ops.window_importance(grouped, keys, *held, importance, scale=self.scale, **sizes)
        repeated, alpha = None, 1.0
        if isinstance(scorer, RKV):
            repeated = torch.empty(len(keys), device=self.device)
            threshold, alpha = scorer.similarity_threshold, scorer.alpha
            self.ops.redundancy(keys, *held, repeated, threshold=threshold, longest=longest)
        sizes |= {"alpha": alpha, "kernel_size": scorer.kernel_size}
        self.ops.combine_scores(importance, repeated, *held, scores, **sizes)
        return scores

    def _divide(self, scores: torch.Tensor, held: Segments, due: Due, longest: int) -> None:
        heads = self.policy.heads
        assert isinstance(heads, UtilityHeads)
        totals, counts = to_device(due.totals, self.device), torch.empty_like(held.lengths)
        sizes = {"n_kv_heads": self.n_kv_heads, "longest": longest}
        self.ops.demand(scores, *held, totals.to(torch.int32), counts, **sizes)
        budgets = divide_heads(
            counts.view(-1, self.n_kv_heads),
            totals,
            exponent=heads.beta,
            floor=heads.mu,
            cap=heads.head_cap,
            protected=sum(self.policy.protection.ends(0, 0)),
        )
        if not due.divide.all():
            again = to_device(due.divide, self.device)
            budgets = torch.where(again[:, None], budgets, self.budgets[due.at])
        self.budgets[due.at] = budgets


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Begin to copy an array to a device, without waiting for what the device has to do before."""
    # Memory that is not pinned has been read when this returns.
    return torch.from_numpy(array).to(device, non_blocking=True)


def new_starts(
    kept: torch.Tensor, bases: torch.Tensor, totals: torch.Tensor, buffer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay stretches out anew, so that every head can take in as much as till the next compression.

    Parameters
    ----------
    kept : int32 Tensor, shape (n_due, n_kv_heads)
    bases, totals : int64 Tensor, shape (n_due,)
        First slot of each stretch, and its budget over all KV heads.
    buffer : int

    Returns
    -------
    starts : int64 Tensor, shape (n_due, n_kv_heads)
    held : int64 Tensor, shape (n_due,)
        Entries kept over all KV heads.
    """
    n_kv_heads = kept.shape[1]
    wide = kept.to(torch.int64)
    held = wide.sum(1)
    # Rounded up to whole tokens, of which each brings every head an entry.
    room = -((held - totals - n_kv_heads * buffer) // n_kv_heads)
    sizes = wide + room[:, None]
    return bases[:, None] + sizes.cumsum(1) - sizes, held
