"""A quick evicting decode of many problems at once, to see accuracy against budget.

Evicted entries are gone from attention, but storage is one rectangle per layer, as long as the longest head:
this measures accuracy, not memory. Prompts are padded on the left and their padding never enters the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AttentionInterface

from simulator.contract import checked_budgets, checked_scores, require_an_entry_in_every_layer
from simulator.layer_replay import lend_unused
from simulator.policies.base import LayerRequest
from simulator.policy import Policy
from simulator.selection import select_slots
from simulator.view import CacheView
from simulator.wave import Wave

IMPLEMENTATION = "kvbudget_evict_batch"
_ATTRIBUTE = "_kvbudget_evicting_batch"
_NEVER = np.iinfo(np.int64).max
# Rows that have ended are dropped once they are this share of the batch.
_DROP_AT = 0.2


class EvictingLayer:
    """One layer's entries for all sequences of a batch; who stays is decided as in the simulator.

    Attributes
    ----------
    keys, values : float32 (n_rows, n_kv_heads, capacity, head_dim)
    positions : int32 (n_rows, n_kv_heads, capacity)
    lengths : int64 (n_rows, n_kv_heads)
    queries : float32 (n_rows, n_query_heads, window, head_dim)
        The last queries of every row, a ring whose newest stands at ``newest``.
    due : int64 (n_rows,)
        Token count of each row's next compression.
    """

    def __init__(
        self, layer: int, policy: Policy, entries: Sequence[int], prompts: Sequence[int], seeds: Sequence[int]
    ) -> None:
        self.layer, self.policy = layer, policy
        self.entries, self.prompts, self.seeds = np.array(entries), np.array(prompts), np.array(seeds)
        self.due = np.full(len(entries), _NEVER)
        self.last_reallocation = np.full(len(entries), -1)
        self.scale = 0.0

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend to the whole prompt and take it in; all arguments (n_rows, heads, length, head_dim)."""
        n_rows, n_kv_heads, length, _ = key.shape
        self.scale, self.n_kv_heads = scaling, n_kv_heads
        prompts = torch.from_numpy(self.prompts)
        column = torch.arange(length)
        real = column[None, :] >= length - prompts[:, None]
        mask = real[:, None, None, :] & (column[None, :] <= column[:, None])[None, None]
        # A padding row sees itself, since a softmax over nothing is not a number; nobody reads the result.
        mask = mask | torch.eye(length, dtype=torch.bool)[None, None]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        capacity = length + 64
        self.keys = key.new_zeros(n_rows, n_kv_heads, capacity, key.shape[-1])
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.zeros(n_rows, n_kv_heads, capacity, dtype=torch.int32)
        for row, n_tokens in enumerate(self.prompts):
            self.keys[row, :, :n_tokens] = key[row, :, length - n_tokens :]
            self.values[row, :, :n_tokens] = value[row, :, length - n_tokens :]
            self.positions[row, :, :n_tokens] = torch.arange(n_tokens)
        self.lengths = prompts[:, None].repeat(1, n_kv_heads)
        window = max(1, self.policy.scorer.window)
        self.queries = query.new_zeros(n_rows, query.shape[1], window, query.shape[-1])
        seen = query[:, :, -window:]
        self.queries[:, :, window - seen.shape[2] :] = seen
        self.newest = window - 1
        self.budgets = np.repeat(self.entries[:, None], n_kv_heads, 1)
        for row, n_tokens in enumerate(self.prompts):
            total = self.entries[row] * n_kv_heads
            if self.policy.trigger.prompt == "compress" and n_tokens * n_kv_heads > total:
                self.compress(row, int(n_tokens))
            self._schedule(row, int(n_tokens))
        return output

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n_tokens: np.ndarray
    ) -> torch.Tensor:
        """Append one token per row, attend, then compress the rows that are due."""
        n_rows, n_heads, _, width = query.shape
        if int(self.lengths.max()) + 1 > self.keys.shape[2]:
            self._grow()
        rows = torch.arange(n_rows)[:, None]
        heads = torch.arange(self.n_kv_heads)[None]
        self.keys[rows, heads, self.lengths] = key[:, :, 0]
        self.values[rows, heads, self.lengths] = value[:, :, 0]
        self.positions[rows, heads, self.lengths] = torch.from_numpy(n_tokens - 1).int()[:, None]
        self.lengths += 1
        longest = int(self.lengths.max())
        grouped = query.view(n_rows, self.n_kv_heads, -1, width)
        logits = (grouped * self.scale) @ self.keys[:, :, :longest].transpose(2, 3)
        absent = torch.arange(longest)[None, None] >= self.lengths[:, :, None]
        weights = logits.masked_fill_(absent[:, :, None], -torch.inf).softmax(-1)
        output = weights @ self.values[:, :, :longest]
        self.newest = (self.newest + 1) % self.queries.shape[2]
        self.queries[:, :, self.newest] = query[:, :, 0]
        for row in np.flatnonzero(self.due <= n_tokens):
            self.compress(int(row), int(n_tokens[row]))
            self._schedule(int(row), int(n_tokens[row]))
        return output.view(n_rows, n_heads, 1, width)

    def compress(self, row: int, n_tokens: int) -> None:
        """Evict from every head of one row what exceeds its budget."""
        scores = self._scores(row, n_tokens)
        policy, lengths = self.policy, self.lengths[row].numpy()
        total, last = int(self.entries[row]) * self.n_kv_heads, int(self.last_reallocation[row])
        if policy.heads.delta > 0 and (last < 0 or n_tokens - last >= policy.heads.delta):
            budgets, _ = policy.heads.allocate(scores, total, policy.protected)
            self.budgets[row] = checked_budgets(
                policy.heads.name, budgets, self.n_kv_heads, total, policy.protected
            )
            self.last_reallocation[row] = n_tokens
        allowed = lend_unused(self.budgets[row], lengths) if policy.redistribute else self.budgets[row]
        for head, n_kept in enumerate(allowed):
            held = self.positions[row, head, : lengths[head]].numpy()
            if len(held) <= n_kept:
                continue
            kept = torch.from_numpy(select_slots(scores[head], held, int(n_kept), policy.scorer.slot_order))
            for stored in (self.keys, self.values, self.positions):
                stored[row, head, : len(kept)] = stored[row, head, kept]
            self.lengths[row, head] = len(kept)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Drop all other rows."""
        index = torch.from_numpy(rows)
        for name in ("keys", "values", "positions", "lengths", "queries"):
            setattr(self, name, getattr(self, name)[index])
        for name in ("entries", "prompts", "seeds", "due", "last_reallocation", "budgets"):
            setattr(self, name, getattr(self, name)[rows])

    def _schedule(self, row: int, n_tokens: int) -> None:
        n_entries, total = int(self.lengths[row].sum()), int(self.entries[row]) * self.n_kv_heads
        due = self.policy.trigger.next_compression(n_tokens, n_entries, total, self.n_kv_heads)
        self.due[row] = _NEVER if due is None else due

    def _scores(self, row: int, n_tokens: int) -> list[np.ndarray]:
        window = min(self.policy.scorer.window, n_tokens)
        in_order = self.queries[row].roll(-1 - self.newest, 1)
        queries = in_order.view(self.n_kv_heads, -1, *in_order.shape[1:]).numpy()
        scores = []
        for head in range(self.n_kv_heads):
            length = int(self.lengths[row, head])
            view = CacheView(
                keys=self.keys[row, head, :length].numpy(),
                positions=self.positions[row, head, :length].numpy(),
                queries=queries[head][:, queries.shape[2] - window :],
                scale=self.scale,
                n_tokens=n_tokens,
                prompt_tokens=int(self.prompts[row]),
                layer=self.layer,
                kv_head=head,
                seed=int(self.seeds[row]),
            )
            scores.append(checked_scores(self.policy.scorer, view))
        return scores

    def _grow(self) -> None:
        extra = max(64, self.keys.shape[2] // 4)
        for name in ("keys", "values"):
            setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, 0, 0, extra)))
        self.positions = torch.nn.functional.pad(self.positions, (0, extra))


class _Batch:
    """What the attention function needs to know of the batch that is being decoded."""

    def __init__(self, layers: list[EvictingLayer], n_tokens: np.ndarray) -> None:
        self.layers, self.n_tokens, self.prefilling = layers, n_tokens, True


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    batch = getattr(module, _ATTRIBUTE)
    layer = batch.layers[module.layer_idx]
    if batch.prefilling:
        output = layer.prefill(query, key, value, float(scaling or module.scaling))
    else:
        output = layer.step(query, key, value, batch.n_tokens)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attend)


@torch.inference_mode()
def decode_evicting(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    entries: Sequence[int],
    limits: Sequence[int],
    *,
    eos: int,
    name: str = "",
    waves: dict[str, Wave] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Decode greedily under eviction, one cache per prompt.

    Parameters
    ----------
    model : LlamaForCausalLM or alike, float32, on the CPU
        Its attention implementation is replaced.
    prompts : token ids
    policy : Policy
    entries : int per prompt
        Mean budget in entries per KV head.
    limits : int per prompt
        New tokens at most.
    eos : int
    name : str
        The model's name, for layer allocators that know a wave of it.
    seeds : int per prompt, optional
        For scorers that draw at random; 0, 1, ... by default.

    Returns
    -------
    list of list of int, the new tokens of each prompt, without the end token.
    """
    if policy.evicts:
        for budget in entries:
            policy.require_feasible(budget)
    rows = np.arange(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    by_layer = _layer_budgets(model, policy, entries, name, waves or {})
    layers = [
        EvictingLayer(layer, policy, by_layer[layer], lengths, rows if seeds is None else list(seeds))
        for layer in range(len(by_layer))
    ]
    batch = _Batch(layers, lengths.copy())
    model.set_attn_implementation(IMPLEMENTATION)
    for decoder_layer in model.model.layers:
        setattr(decoder_layer.self_attn, _ATTRIBUTE, batch)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    positions = (torch.arange(longest)[None] - torch.from_numpy(longest - lengths)[:, None]).clamp(min=0)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits
    batch.prefilling = False
    completions: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(rows), bool)
    while True:
        chosen = logits[:, -1].argmax(-1)
        for at, token in enumerate(chosen.tolist()):
            if not running[at]:
                continue
            if token == eos:
                running[at] = False
                continue
            completions[rows[at]].append(token)
            running[at] = len(completions[rows[at]]) < limits[rows[at]]
        if not running.any():
            return completions
        if running.mean() <= 1 - _DROP_AT:
            kept = np.flatnonzero(running)
            for layer in layers:
                layer.keep_rows(kept)
            rows, batch.n_tokens, chosen = rows[kept], batch.n_tokens[kept], chosen[torch.from_numpy(kept)]
            running = running[kept]
        batch.n_tokens += 1
        positions = torch.from_numpy(batch.n_tokens - 1)[:, None]
        logits = model(input_ids=chosen[:, None], position_ids=positions, use_cache=False).logits


def _layer_budgets(
    model: torch.nn.Module, policy: Policy, entries: Sequence[int], name: str, waves: dict[str, Wave]
) -> np.ndarray:
    """Divide each prompt's budget over the layers; int64 (n_layers, n_prompts)."""
    n_layers = model.config.num_hidden_layers
    divided = []
    for budget in entries:
        asked = LayerRequest(
            n_layers=n_layers,
            entries=budget,
            protected=policy.protected,
            model=name,
            model_revision="",
            trace_id="",
            waves=waves,
        )
        budgets, _ = policy.layers.allocate(asked)
        total = n_layers * budget
        budgets = checked_budgets(policy.layers.name, budgets, n_layers, total, policy.protected)
        require_an_entry_in_every_layer(policy.layers.name, budgets)
        divided.append(budgets)
    return np.array(divided).T
