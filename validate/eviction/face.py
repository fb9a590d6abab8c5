"""What transformers sees of an evicting cache, whichever back end holds its entries.

Three parts make a cache. The *plan* says what every sequence may keep. The *face*, here, is a transformers
cache: it follows the calls of a model and gathers prompts that come in several passes. The *back end* holds
the entries of all layers, attends to them and evicts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from simulator.policies.language import Policy
from traces.errors import UserError
from traces.shape import ModelShape
from validate.eviction.back_end import BackEnd, Heads
from validate.eviction.cache_layer import EvictingCacheLayer
from validate.eviction.calls import Calls
from validate.eviction.plan import Plan
from validate.eviction.prompts import attend_prompts, padding_of, prompt_lengths
from validate.models.load import model_shape, rope_parameters


class PolicyCache(Cache):
    """A cache of one batch under a policy, to be used within ``evicting``.

    Parameters
    ----------
    plan : Plan
    back_end : BackEnd
    prompt_tokens : int, optional
        As ``EvictingCache``.

    Attributes
    ----------
    policy : Policy
    shape : ModelShape
    calls : Calls
        What is known of the text.
    owner : reference to a PreTrainedModel, or None
        The model that has attended through the cache.
    """

    def __init__(self, plan: Plan, back_end: BackEnd, prompt_tokens: int | None) -> None:
        self.plan, self.back_end = plan, back_end
        self.policy, self.shape = plan.policy, plan.shape
        self.own_layers = [EvictingCacheLayer() for _ in range(plan.shape.n_layers)]
        super().__init__(layers=[*self.own_layers])
        self.calls = Calls(plan.shape.n_layers, prompt_tokens, not back_end.on_device)
        self.owner: weakref.ref[PreTrainedModel] | None = None

    @property
    def n_tokens(self) -> torch.Tensor:
        """Tokens in each row's history, padding left out, once prompts are read; int Tensor (n_rows,)."""
        return self.back_end.n_tokens

    @property
    def held(self) -> np.ndarray:
        """Entries of each sequence during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return self.back_end.held

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all entries' memory: keys and values."""
        return self.back_end.bytes_allocated

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *given: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new tokens on to attention; raises UserError outside of ``evicting``."""
        self.calls.hand_on(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *given, **named)

    def reset(self, prompt_tokens: int | None = None) -> None:
        """Forget the text; the next prompts have ``prompt_tokens`` tokens, if that is known."""
        self.calls.forget(prompt_tokens)
        super().reset()
        self.plan.forget()
        self.back_end.reset()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows and free the others."""
        super().batch_select_indices(indices)
        rows = indices.cpu().numpy()
        self.calls.keep_rows(indices)
        self.plan.keep_rows(rows)
        self.back_end.keep_rows(rows)

    def attend(self, layer: int, heads: Heads, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Attend in one layer, from new tokens to what is held and themselves; the shape of queries.

        The first calls bring the prompts; ``mask`` (n_rows, length) tells where their padding ends.
        """
        n_new = heads.query.shape[2]
        n_seen = self.own_layers[layer].get_seq_length() - n_new
        if self.calls.in_prompts(n_seen):
            prompt_tokens = self.calls.require_part_of_prompts(n_seen, n_new)
            return self._read_prompts(layer, heads, mask, scale, prompt_tokens)
        if n_new > 1 and layer == 0:
            self._require_several(n_new, mask)
        return self.back_end.step(layer, heads, self._new_tokens(n_new))

    def _read_prompts(
        self, layer: int, new: Heads, mask: torch.Tensor | None, scale: float, prompt_tokens: int
    ) -> torch.Tensor:
        """Attend within the prompts, of which this pass is a part or the whole; hand them on once whole."""
        own, heads, (n_rows, _, n_new, _) = self.own_layers[layer], new, new.query.shape
        if n_new < prompt_tokens:
            if self.back_end.on_device:
                raise UserError(
                    f"a cache on a device takes prompts in one pass; found: {n_new} of {prompt_tokens} tokens"
                )
            own.passes.append(new)
            heads = Heads(*(torch.cat(parts, 2) for parts in zip(*own.passes, strict=True)))
        length = heads.query.shape[2]
        if length < prompt_tokens:
            return attend_prompts(new.query, heads.key, heads.value, padding_of(mask, n_rows, length), scale)
        own.passes = []
        if layer == 0:
            self.plan.require_rows(n_rows)
            self.plan.read(prompt_lengths(mask, n_rows, length))
        return self.back_end.prefill(layer, heads, scale)[:, :, -n_new:]

    def _require_several(self, n_new: int, mask: torch.Tensor | None) -> None:
        """Refuse several tokens after the prompts where they cannot be read together."""
        if self.back_end.on_device:
            raise UserError(f"a cache on a device takes tokens one by one; found: {n_new} at once")
        self.calls.require_certain_prompts(n_new)
        if mask is not None and not mask[:, -n_new:].all():
            raise UserError("padding after the prompts cannot be left out; allowed: left-padded prompts")
        most = self.back_end.most_together
        if n_new > most:
            raise UserError(
                f"policy '{self.policy.name}' moves budgets between layers and takes {most} tokens at once "
                f"here; found: {n_new}"
            )

    def _new_tokens(self, n_new: int) -> np.ndarray | None:
        """Give the tokens being read, for triggers that wait for certain ones; int (n_rows, n_new)."""
        trigger = self.policy.trigger
        if self.back_end.on_device or not trigger.reads_tokens:
            return None
        if self.calls.tokens is None:
            raise UserError(
                f"trigger '{trigger.name}' waits for certain tokens; found: a model fed without ids"
            )
        return self.calls.tokens[:, -n_new:].detach().cpu().numpy()


def new_plan(model: PreTrainedModel, policy: Policy, entries: int | Sequence[int], **given: Any) -> Plan:
    """Plan what a batch may keep in a model; parameters and errors as of ``Plan``."""
    if isinstance(entries, torch.Tensor):
        entries = entries.tolist()
    return Plan(policy, *model_kind(model), entries, **given)


def model_kind(model: PreTrainedModel) -> tuple[ModelShape, dict[str, object]]:
    """Give what a plan hangs on: a model's shape and its RoPE parameters."""
    return model_shape(model.config, model.dtype), rope_parameters(model.config)
