"""Entries of a batch that stay on a device: what a step or a compression needs never leaves it."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from traces.errors import UserError
from validate.eviction.back_end import Heads
from validate.eviction.device.compress import (
    DeviceCompressor,
    Due,
    Segments,
    in_blocks,
    new_starts,
    to_device,
)
from validate.eviction.device.plan import buffer_of, memory_plan, unsupported_part
from validate.eviction.device.pool import DevicePool
from validate.eviction.device.schedule import Schedule
from validate.eviction.kernels.ops import Ops, ops_for, require_shape
from validate.eviction.plan import Plan, whole_number


class DeviceBackEnd:
    """What a batch holds in all layers, in one block of a device's memory; see ``BackEnd``.

    Between two compressions a decode step is the same launches on the same memory, so that a CUDA graph can
    hold it.

    Parameters
    ----------
    plan : Plan
    device, dtype
        The model's.
    ahead, ops
        As ``DeviceCache``.

    Raises
    ------
    UserError
        For a policy or a model that the device cannot serve.
    NoDeviceError
        When the cache does not fit, or without Triton on a GPU.

    Attributes
    ----------
    pool : DevicePool
    ring : Tensor, shape (n_layers, n_rows, n_query_heads, window, head_dim)
        Each row's last queries, at their positions modulo the window.
    n_tokens : int32 Tensor, shape (n_rows,)
        Tokens in each row's history, on the device.
    schedule : Schedule
    n_compressions : int
        After the prompts; one for all layers and rows that were due together.
    keeps_time : bool
        Whether tokens are counted by each step; see ``advance``.
    """

    on_device = True
    most_together = 1

    pool: DevicePool
    ring: torch.Tensor
    n_tokens: torch.Tensor
    schedule: Schedule
    compressor: DeviceCompressor

    def __init__(
        self, plan: Plan, device: torch.device, dtype: torch.dtype, ahead: int, ops: Ops | None
    ) -> None:
        found = unsupported_part(plan.policy)
        if found:
            raise UserError(f"policy '{plan.policy.name}' has {found}, which is decided on the host only")
        shape = plan.shape
        require_shape(shape.head_dim, shape.n_query_heads // shape.n_kv_heads)
        self.plan, self.policy, self.shape = plan, plan.policy, shape
        self._ahead, self._device, self._dtype = whole_number(ahead, "ahead", 0), device, dtype
        self.ops = ops or ops_for(device)
        self.keeps_time = True
        self.reset()

    @property
    def held(self) -> np.ndarray:
        """Entries of each row during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return self.schedule.held

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the pool: keys and values."""
        return self.pool.bytes_allocated

    def prefill(self, layer: int, heads: Heads, scale: float) -> torch.Tensor:
        """Attend within whole prompts in one layer, and take in what of them is to stay."""
        if layer == 0:
            self._set_up(scale)
        query, key, value = heads.query, heads.key.contiguous(), heads.value.contiguous()
        padding = query.shape[2] - self.plan.prompts
        output = _attend_prompts(query, key, value, padding, scale)
        self._remember_prompts(layer, query)
        due = self.schedule.due_prompts(layer)
        for rows, is_compressed in ((np.flatnonzero(due), True), (np.flatnonzero(~due), False)):
            if len(rows):
                self._take_in(layer, rows, key, value, padding, is_compressed)
        return output

    def step(self, layer: int, heads: Heads, token_ids: np.ndarray | None = None) -> torch.Tensor:
        """Take in one token per row in one layer, attend from it, and compress after the last layer."""
        if layer == 0:
            self.require_room()
        output = self._append_and_attend(layer, heads)
        if layer == self.shape.n_layers - 1:
            self.n_tokens.add_(1)
            if self.keeps_time:
                self.advance()
        return output

    def require_room(self) -> None:
        """Refuse a token that no memory was laid out for.

        Raises
        ------
        UserError
        """
        n_decoded = self.schedule.n_tokens - self.plan.prompts
        if not self.policy.evicts and (n_decoded >= self._ahead).any():
            raise UserError(f"a full cache was laid out for {self._ahead} tokens; found: one more")

    def advance(self) -> None:
        """Count the token that all layers have attended from, and compress what is due.

        Called by ``step`` itself unless ``keeps_time`` is off, as it is where a graph replays the step.
        """
        due = self.schedule.advance()
        if due.any():
            self.compress(due)

    def reset(self) -> None:
        """Forget the text; its memory is given back once another is laid out."""
        self._has_prompts, self.n_compressions = False, 0

    def keep_rows(self, rows: np.ndarray) -> None:
        """Keep only some rows; the slots of the others lie idle."""
        if not self._has_prompts:
            return
        index = to_device(rows, self._device)
        self.schedule.keep_rows(rows)
        self.pool.keep_rows(rows, index)
        self.compressor.keep_rows(index)
        self.ring, self.n_tokens = self.ring[:, index].contiguous(), self.n_tokens[index]

    def _set_up(self, scale: float) -> None:
        """Lay out memory for the prompts that the plan has read."""
        prompts, n_kv_heads = self.plan.prompts, self.shape.n_kv_heads
        entries = np.ascontiguousarray(self.plan.budgets.T)
        stretches, self._longest = memory_plan(self.policy, entries, prompts, self._ahead, n_kv_heads)
        window = self.policy.scorer.window if self.policy.evicts else 0
        self.pool = DevicePool(stretches, n_kv_heads, self.shape.head_dim, self._dtype, self._device)
        size = (*stretches.shape, self.shape.n_query_heads, window, self.shape.head_dim)
        self.ring = torch.zeros(size, dtype=self._dtype, device=self._device)
        self.schedule = Schedule(self.policy, entries, prompts, n_kv_heads)
        self.compressor = DeviceCompressor(self.policy, self.ops, entries, n_kv_heads, scale, self._device)
        self.n_tokens = to_device(prompts.astype(np.int32), self._device)
        self._scale, self._has_prompts = scale, True

    def _take_in(
        self,
        layer: int,
        rows: np.ndarray,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: np.ndarray,
        is_compressed: bool,
    ) -> None:
        """Store some rows' prompts, or what is to stay of them."""
        n_kv_heads, length = key.shape[1:3]
        segments = (rows[:, None] * n_kv_heads + np.arange(n_kv_heads)) * length + padding[rows, None]
        lengths = np.repeat(self.plan.prompts[rows, None], n_kv_heads, 1).astype(np.int32)
        source = to_device(segments.reshape(-1), self._device)
        keys, values = (tensor.view(-1, tensor.shape[3]) for tensor in (key, value))
        due = self._due(np.full(len(rows), layer), rows)
        survivors, kept, longest = None, to_device(lengths, self._device), int(lengths.max())
        if is_compressed:
            held = Segments(source, kept.reshape(-1))
            survivors, kept = self.compressor.decide(keys, held, self.ring[due.at], due, longest)
        starts = self._lay_out(due, kept, is_compressed).reshape(-1)
        chosen = survivors, source, kept.reshape(-1)
        self.ops.fill(keys, values, source, *chosen, *self.pool.entries, starts, longest=longest)

    def _append_and_attend(self, layer: int, heads: Heads) -> torch.Tensor:
        query, key, value = (tensor[:, :, 0] for tensor in heads)
        pool, query = self.pool, query.contiguous()
        held = Segments(pool.starts[layer].view(-1), pool.lengths[layer].view(-1))
        ring = self.ring[layer] if self.ring.shape[3] else None
        self.ops.append(key, value, query, *pool.entries, *held, self.n_tokens, ring)
        output, longest = torch.empty_like(query), int(self._longest[layer])
        self.ops.attend(query, pool.keys, pool.values, *held, output, scale=self._scale, longest=longest)
        return output[:, :, None]

    def compress(self, due: np.ndarray) -> None:
        """Evict from what is due, bool (n_layers, n_rows), all layers of a block by the same launches."""
        pool = self.pool
        self.n_compressions += 1
        for slots, layers, rows in in_blocks(due, pool):
            block, longest = self._due(layers, rows), int(self._longest[layers].max())
            keys, values, positions = (own[slots] for own in pool.entries)
            starts = (pool.starts[block.at] - slots.start).reshape(-1)
            held = Segments(starts, pool.lengths[block.at].reshape(-1))
            survivors, kept = self.compressor.decide(keys, held, self.ring[block.at], block, longest)
            moved = (self._lay_out(block, kept, True) - slots.start).reshape(-1)
            chosen = survivors, starts, kept.reshape(-1), moved
            self.ops.compact(keys, values, positions, *chosen, n_kv_heads=self.shape.n_kv_heads)

    def _due(self, layers: np.ndarray, rows: np.ndarray) -> Due:
        schedule, at = self.schedule, (to_device(layers, self._device), to_device(rows, self._device))
        return Due(layers, rows, schedule.totals[layers, rows], schedule.to_divide()[layers, rows], at)

    def _lay_out(self, due: Due, kept: torch.Tensor, is_compressed: bool) -> torch.Tensor:
        """Give what is kept its place; int64 Tensor (n_due, n_kv_heads), the first slots."""
        pool, buffer = self.pool, buffer_of(self.policy)
        bases = to_device(pool.bases[due.layers, due.rows], self._device)
        totals = due.totals
        if not self.policy.evicts:
            totals = self.shape.n_kv_heads * (self.plan.prompts[due.rows] + self._ahead)
        starts, held = new_starts(kept, bases, to_device(totals, self._device), buffer)
        pool.starts[due.at], pool.lengths[due.at] = starts, kept
        if is_compressed:
            self.schedule.compressed(due.layers, due.rows, due.divide, held)
        return starts

    def _remember_prompts(self, layer: int, query: torch.Tensor) -> None:
        """Put the prompts' last queries into the ring, each at its position modulo the window."""
        window = self.ring.shape[3]
        n = min(window, query.shape[2])
        if n:
            slots = (self.plan.prompts[:, None] - n + np.arange(n)) % window
            index = to_device(slots, self._device)[:, None, :, None]
            recent = query[:, :, -n:]
            self.ring[layer].scatter_(2, index.expand_as(recent), recent)


def _attend_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: np.ndarray, scale: float
) -> torch.Tensor:
    """Attend causally within each prompt; zero where a row has no token."""
    attend = partial(
        scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if not padding.any():
        return attend(query, key, value)
    output = torch.zeros_like(query)
    for row, first in enumerate(padding.tolist()):
        own = slice(row, row + 1), slice(None), slice(first, None)
        output[own] = attend(query[own], key[own], value[own])
    return output
