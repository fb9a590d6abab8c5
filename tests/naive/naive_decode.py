"""A slow twin of the evicting decode: one sequence, everything is kept, and a mask says what is left.

The model runs with a full cache of its own; the policy's parts are asked directly, entry by entry.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from simulator.policies.parts import HeadRequest, LayerRequest
from simulator.policies.view import CacheView

NAME = "kvbudget_masked_twin"


class MaskedLayer:
    """One layer of one sequence: all keys and values, and per KV head the positions that are retained."""

    def __init__(self, layer, policy, budget, seed):
        self.layer, self.policy, self.budget, self.seed = layer, policy, budget, seed
        self.reallocated = None
        self.queries = None

    def attend(self, query, key, value, scale):
        """Attend from the new tokens to what is retained and themselves; (heads, n_new, width)."""
        n_kv_heads, n_tokens, _ = key.shape
        n_new = query.shape[1]
        if self.queries is None:
            self.prompt_tokens, self.retained = n_tokens, [list(range(n_tokens)) for _ in range(n_kv_heads)]
            self.budgets = [self.budget] * n_kv_heads
            self.queries = query
        else:
            self.retained = [[*own, n_tokens - 1] for own in self.retained]
            self.queries = torch.cat([self.queries, query], 1)
        seen = torch.zeros(n_kv_heads, n_tokens, dtype=torch.bool)
        for kv_head, own in enumerate(self.retained):
            seen[kv_head, own] = True
        group_size = len(query) // n_kv_heads
        past = torch.ones(n_new, n_tokens, dtype=torch.bool).tril(n_tokens - n_new)
        logits = scale * query @ key.repeat_interleave(group_size, 0).transpose(1, 2)
        visible = past & seen.repeat_interleave(group_size, 0)[:, None]
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        if self.is_due(n_tokens):
            self.compress(key.numpy(), scale, n_tokens)
        return weights @ value.repeat_interleave(group_size, 0)

    def is_due(self, n_tokens):
        policy, n_kv_heads = self.policy, len(self.retained)
        held, total = sum(map(len, self.retained)), self.budget * n_kv_heads
        if n_tokens == self.prompt_tokens:
            due = policy.trigger.prompt == "compress" and held > total
            self.next = (
                n_tokens if due else policy.trigger.next_compression(n_tokens, held, total, n_kv_heads)
            )
        return self.next == n_tokens

    def compress(self, keys, scale, n_tokens):
        policy, n_kv_heads = self.policy, len(self.retained)
        window = min(policy.scorer.window, n_tokens)
        queries = self.queries[:, n_tokens - window :].numpy()
        scores = []
        for kv_head, own in enumerate(self.retained):
            group_size = len(queries) // n_kv_heads
            view = CacheView(
                keys=keys[kv_head, own],
                positions=np.array(own, np.int32),
                queries=queries[kv_head * group_size : (kv_head + 1) * group_size],
                scale=scale,
                n_tokens=n_tokens,
                prompt_tokens=self.prompt_tokens,
                layer=self.layer,
                kv_head=kv_head,
                seed=self.seed,
            )
            scores.append(np.array(policy.scorer.score(view), np.float32))
            for slot, position in enumerate(own):
                if position < policy.scorer.sinks or position >= n_tokens - policy.scorer.recent:
                    scores[-1][slot] = np.inf
        total, delta = self.budget * n_kv_heads, policy.heads.delta
        if delta and (self.reallocated is None or n_tokens - self.reallocated >= delta):
            protected = policy.scorer.sinks + policy.scorer.recent
            budgets, _ = policy.heads.allocate(HeadRequest(scores, total, protected, self.layer))
            self.budgets, self.reallocated = budgets.tolist(), n_tokens
        for kv_head, own in enumerate(self.retained):
            best = sorted(zip(scores[kv_head], own, strict=True), reverse=True)[: self.budgets[kv_head]]
            self.retained[kv_head] = sorted(position for _, position in best)
        held = sum(map(len, self.retained))
        self.next = policy.trigger.next_compression(n_tokens, held, total, n_kv_heads)


def _attend(module, query, key, value, attention_mask, scaling, **_):
    output = module.masked_twin[module.layer_idx].attend(query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@torch.inference_mode()
def decode_masked(model, prompt, policy, entries, n_new, *, waves, name, seed=0):
    """Decode one prompt greedily.

    Gives the new tokens, and who is retained after the prompt and after every decode step: per layer and
    KV head, positions in time order.
    """
    n_layers = model.config.num_hidden_layers
    asked = LayerRequest(n_layers, entries, policy.scorer.sinks + policy.scorer.recent, name, "", "", waves)
    budgets = policy.layers.allocate(asked)[0].tolist()
    layers = [MaskedLayer(layer, policy, budget, seed) for layer, budget in enumerate(budgets)]
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for decoder_layer in model.model.layers:
        decoder_layer.self_attn.masked_twin = layers
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
    found = SimpleNamespace(token_ids=[], retained=[])
    while len(found.token_ids) < n_new:
        logits = model(input_ids=ids, past_key_values=cache).logits[0, -1]
        found.retained.append([[list(own) for own in layer.retained] for layer in layers])
        found.token_ids.append(int(logits.argmax()))
        ids = torch.tensor([found.token_ids[-1:]])
    model.set_attn_implementation(before)
    return found
