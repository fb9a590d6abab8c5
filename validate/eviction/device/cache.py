"""An evicting cache that stays on its device: scoring, budgets of heads, selection and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from traces.errors import UserError
from validate.eviction.cache import EvictingCache, whole_number
from validate.eviction.device.compress import (
    DeviceCompressor,
    Due,
    in_blocks,
    new_starts,
    to_device,
)
from validate.eviction.device.plan import buffer_of, memory_plan, unsupported_part
from validate.eviction.device.pool import DevicePool
from validate.eviction.device.schedule import Schedule
from validate.eviction.kernels.ops import Ops, ops_for, require_shape
from validate.eviction.prompts import prompt_lengths


class DeviceCache(EvictingCache):
    """The cache of one batch under a policy, for policies whose every part the device can carry out.

    It decides as ``EvictingCache`` does, which takes any policy and scores on the host. Between two
    compressions a decode step is the same launches on the same memory, so that a CUDA graph can hold it.

    Parameters
    ----------
    model : PreTrainedModel
    policy : Policy
    entries : int or sequence of int
        Mean budget in entries per KV head, of all sequences or of each.
    ahead : int
        Tokens to be decoded at most; a full cache takes their memory at once.
    prompt_tokens, name, revision, waves, seeds
        As ``EvictingCache``.
    ops : Ops, optional
        The kernels; those of the model's device by default.

    Raises
    ------
    UserError
        For a policy or a model that the device cannot serve.
    NoDeviceError
        When the cache does not fit, or without Triton on a GPU.
    InfeasibleBudgetError, MissingDataError, PolicyError
        As ``EvictingCache``.

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
        Whether the cache counts tokens itself; see ``advance``.
    """

    # Later passes are queued on the device; nothing of them is looked at.
    _reads_values = False

    pool: DevicePool
    ring: torch.Tensor
    n_tokens: torch.Tensor
    schedule: Schedule
    compressor: DeviceCompressor
    _limit: np.ndarray | None

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        entries: int | Sequence[int],
        *,
        ahead: int,
        prompt_tokens: int | None = None,
        name: str = "",
        revision: str = "",
        waves: dict[str, Wave] | None = None,
        seeds: Sequence[int] | None = None,
        ops: Ops | None = None,
    ) -> None:
        super().__init__(
            model,
            policy,
            entries,
            prompt_tokens=prompt_tokens,
            name=name,
            revision=revision,
            waves=waves,
            seeds=seeds,
        )
        found = unsupported_part(policy)
        if found:
            raise UserError(f"policy '{policy.name}' has {found}, which is decided on the host only")
        require_shape(self.shape.head_dim, self.shape.n_query_heads // self.shape.n_kv_heads)
        self._ahead, self._device, self._dtype = whole_number(ahead, "ahead", 0), model.device, model.dtype
        self.ops = ops or ops_for(model.device)
        self._n_filled = self.n_compressions = 0
        self.keeps_time = True

    @property
    def held(self) -> np.ndarray:
        """Entries of each sequence during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return self.schedule.held

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all entries' memory: keys and values."""
        return self.pool.bytes_allocated

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attend in one layer, from new tokens to what is held and themselves; (n_rows, heads, n_new, width).

        The first call brings the prompts; ``mask`` (n_rows, length) tells where their padding ends.
        """
        is_last = layer == len(self.layers) - 1
        if self._n_filled <= layer:
            prompt_tokens = self.calls.require_part_of_prompts(0, query.shape[2])
            if query.shape[2] < prompt_tokens:
                raise UserError(
                    f"a cache on a device takes prompts in one pass; found: {query.shape[2]} of "
                    f"{prompt_tokens} tokens"
                )
            if layer == 0:
                self._set_up(prompt_lengths(mask, query.shape[0], query.shape[2]), scale)
            output = self._prefill(layer, query, key, value)
            self._n_filled = layer + 1
            return output
        if query.shape[2] > 1:
            raise UserError(f"a cache on a device takes tokens one by one; found: {query.shape[2]} at once")
        if layer == 0:
            self.require_room()
        output = self._step(layer, query, key, value)
        if is_last:
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
        if self._limit is not None and (self.schedule.n_tokens >= self._limit).any():
            raise UserError(f"a full cache was laid out for {self._ahead} tokens; found: one more")

    def advance(self) -> None:
        """Count the token that all layers have attended from, and compress what is due.

        Called by the cache itself unless ``keeps_time`` is off, as it is where a graph replays the step.
        """
        due = self.schedule.advance()
        if due.any():
            self._compress(due)

    def reset(self, prompt_tokens: int | None = None) -> None:
        """Forget the text; the next prompts have ``prompt_tokens`` tokens, if that is known."""
        super().reset(prompt_tokens)
        self._n_filled = self.n_compressions = 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows."""
        super().batch_select_indices(indices)
        if self._n_filled:
            rows, index = indices.cpu().numpy(), indices.to(self._device)
            self.schedule.keep_rows(rows)
            self.pool.keep_rows(rows, index)
            self.compressor.keep_rows(index)
            self.ring, self.n_tokens = self.ring[:, index].contiguous(), self.n_tokens[index]
            if self._limit is not None:
                self._limit = self._limit[rows]

    def _set_up(self, prompts: np.ndarray, scale: float) -> None:
        """Lay out memory for prompts of so many tokens, int64 (n_rows,)."""
        n_rows, n_kv_heads = len(prompts), self.shape.n_kv_heads
        self._require_rows(n_rows)
        self._prompts, self._budgets = prompts, self._divide(prompts)
        entries = np.ascontiguousarray(np.broadcast_to(self._budgets, (n_rows, len(self.layers))).T)
        stretches, self._longest = memory_plan(self.policy, entries, prompts, self._ahead, n_kv_heads)
        self._limit = None if self.policy.evicts else prompts + self._ahead
        window = self.policy.scorer.window if self.policy.evicts else 0
        self.pool = DevicePool(stretches, n_kv_heads, self.shape.head_dim, self._dtype, self._device)
        self.ring = torch.zeros(
            *stretches.shape,
            self.shape.n_query_heads,
            window,
            self.shape.head_dim,
            dtype=self._dtype,
            device=self._device,
        )
        self.schedule = Schedule(self.policy, entries, prompts, n_kv_heads)
        self.compressor = DeviceCompressor(self.policy, self.ops, entries, n_kv_heads, scale, self._device)
        self.n_tokens = to_device(prompts.astype(np.int32), self._device)
        self._scale = scale

    def _prefill(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        key, value = key.contiguous(), value.contiguous()
        padding = query.shape[2] - self._prompts
        output = _attend_prompts(query, key, value, padding, self._scale)
        self._remember_prompts(layer, query)
        due = self.schedule.due_prompts(layer)
        for rows, is_compressed in ((np.flatnonzero(due), True), (np.flatnonzero(~due), False)):
            if len(rows):
                self._take_in(layer, rows, key, value, padding, is_compressed)
        return output

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
        lengths = np.repeat(self._prompts[rows, None], n_kv_heads, 1).astype(np.int32)
        source = to_device(segments, self._device)
        keys, values = (tensor.view(-1, tensor.shape[3]) for tensor in (key, value))
        layers = np.full(len(rows), layer)
        due = Due(
            layers,
            rows,
            self.schedule.totals[layers, rows],
            self.schedule.to_divide()[layers, rows],
            layer,
            layer + 1,
        )
        survivors, kept, longest = None, to_device(lengths, self._device), int(lengths.max())
        if is_compressed:
            queries = self.ring[layer, to_device(rows, self._device)]
            survivors, kept = self.compressor.decide(keys, source, kept, queries, due, longest)
        starts = self._lay_out(due, kept, is_compressed)
        self.ops.fill(
            keys,
            values,
            source.reshape(-1),
            survivors,
            source.reshape(-1),
            kept.reshape(-1),
            self.pool.keys,
            self.pool.values,
            self.pool.positions,
            starts.reshape(-1),
            longest=longest,
        )

    def _step(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        pool, query = self.pool, query[:, :, 0].contiguous()
        starts, lengths = pool.starts[layer].view(-1), pool.lengths[layer].view(-1)
        self.ops.append(
            key[:, :, 0],
            value[:, :, 0],
            query,
            pool.keys,
            pool.values,
            pool.positions,
            starts,
            lengths,
            self.n_tokens,
            self.ring[layer] if self.ring.shape[3] else None,
        )
        output = torch.empty_like(query)
        self.ops.attend(
            query,
            pool.keys,
            pool.values,
            starts,
            lengths,
            output,
            scale=self._scale,
            longest=int(self._longest[layer]),
        )
        return output[:, :, None]

    def _compress(self, due: np.ndarray) -> None:
        pool = self.pool
        self.n_compressions += 1
        for block in in_blocks(due, self.schedule.totals, self.schedule.to_divide(), pool):
            slots = pool.layers(block.first_layer, block.stop_layer)
            layers, rows = (to_device(at, self._device) for at in (block.layers, block.rows))
            starts, lengths = pool.starts[layers, rows] - slots.start, pool.lengths[layers, rows]
            longest = int(self._longest[block.layers].max())
            keys, values = pool.keys[slots], pool.values[slots]
            survivors, kept = self.compressor.decide(
                keys, starts, lengths, self.ring[layers, rows], block, longest
            )
            moved = self._lay_out(block, kept, True) - slots.start
            self.ops.compact(
                keys,
                values,
                pool.positions[slots],
                survivors,
                starts.reshape(-1),
                kept.reshape(-1),
                moved.reshape(-1),
                n_kv_heads=self.shape.n_kv_heads,
            )

    def _lay_out(self, due: Due, kept: torch.Tensor, is_compressed: bool) -> torch.Tensor:
        """Give what is kept its place; int64 Tensor (n_due, n_kv_heads), the first slots."""
        pool, buffer = self.pool, buffer_of(self.policy)
        bases = to_device(pool.bases[due.layers, due.rows], self._device)
        totals = self.schedule.totals[due.layers, due.rows]
        if not self.policy.evicts:
            totals = self.shape.n_kv_heads * (self._prompts[due.rows] + self._ahead)
        starts, held = new_starts(kept, bases, to_device(totals, self._device), buffer)
        layers, rows = (to_device(at, self._device) for at in (due.layers, due.rows))
        pool.starts[layers, rows], pool.lengths[layers, rows] = starts, kept
        if is_compressed:
            self.schedule.compressed(due.layers, due.rows, due.divide, held)
        return starts

    def _remember_prompts(self, layer: int, query: torch.Tensor) -> None:
        """Put the prompts' last queries into the ring, each at its position modulo the window."""
        window = self.ring.shape[3]
        n = min(window, query.shape[2])
        if n:
            slots = (self._prompts[:, None] - n + np.arange(n)) % window
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
