"""A transformers cache whose entries are evicted by a policy while the model decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from simulator.contract import checked_table
from simulator.policies.base import LayerRequest
from simulator.policy import Policy
from simulator.request import divide_over_layers, require_data
from simulator.wave import Wave, known_waves
from traces.errors import UserError
from validate.attention import replaced_attention, unsupported_feature
from validate.eviction.layer import EvictingLayer
from validate.models import model_shape, rope_parameters

IMPLEMENTATION = "kvbudget_evict"
_ATTRIBUTE = "_kvbudget_evicting_cache"


class EvictingCacheLayer(CacheLayerMixin):
    """What transformers sees of one layer: a cache of true length that hands on the new tokens only."""

    is_sliding = False

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.entries: EvictingLayer | None = None
        self._n_seen = 0

    def lazy_initialization(self, *states: torch.Tensor) -> None:
        """Nothing is set up before attention has seen the prompt."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and hand them on to attention, which stores them."""
        self.count(key_states.shape[2])
        return key_states, value_states

    def count(self, n_tokens: int) -> None:
        """Count tokens that attention has stored or is about to."""
        self._n_seen += n_tokens

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Give the length of a mask over the whole history, and its offset."""
        # Up to 5.16 the positions of the queries are given instead of their number.
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self._n_seen + query_length, 0

    def get_seq_length(self) -> int:
        """Give the tokens of the history, padding included; evicted or not."""
        return self._n_seen

    def get_max_length(self) -> int:
        """Give -1: there is no longest history."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.entries, self._n_seen = None, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows and free the others."""
        if self.entries is not None:
            self.entries.keep_rows(indices.cpu().numpy())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse: beams would have to share entries."""
        raise UserError("an evicting cache cannot follow a beam search; allowed: greedy decoding, sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse, as beams."""
        raise UserError(f"an evicting cache cannot be repeated {repeats} times; allowed: repeated prompts")

    def crop(self, *_: object, **__: object) -> None:
        """Refuse: what was evicted does not come back."""
        # What is given, the tokens to keep or those to drop, depends on the version.
        raise UserError("an evicting cache cannot give tokens back; allowed: a new cache")


class EvictingCache(Cache):
    """The cache of one batch under a policy; use it within ``evicting``.

    Parameters
    ----------
    model : PreTrainedModel
    policy : Policy
    entries : int or sequence of int
        Mean budget in entries per KV head, of all sequences or of each.
    name, revision : str
        The model's, for layer allocators that know a wave of it.
    waves : dict, optional
        Known demand profiles by model name; those that ship with the package by default.
    seeds : sequence of int, optional
        For scorers that draw at random; 0, 1, ... by default.
    layer_type : type of EvictingLayer
        Another kind of layer, to observe or to compare.

    Raises
    ------
    InfeasibleBudgetError, MissingDataError, PolicyError
        As ``divide_over_layers``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        entries: int | Sequence[int],
        *,
        name: str = "",
        revision: str = "",
        waves: dict[str, Wave] | None = None,
        seeds: Sequence[int] | None = None,
        layer_type: type[EvictingLayer] = EvictingLayer,
    ) -> None:
        shape, rope = model_shape(model.config, model.dtype), rope_parameters(model.config)
        self.shape = shape
        super().__init__(layers=[EvictingCacheLayer(layer) for layer in range(shape.n_layers)])
        self.policy, self._seeds, self._layer_type = policy, seeds, layer_type
        self._one_budget = isinstance(entries, Integral)
        self._asked = [int(entries)] if isinstance(entries, Integral) else [int(entry) for entry in entries]
        self._request = LayerRequest(
            n_layers=shape.n_layers,
            entries=0,
            protected=policy.protected,
            model=name,
            model_revision=revision,
            trace_id="",
            waves=known_waves() if waves is None else waves,
            n_kv_heads=shape.n_kv_heads,
        )
        self._rope = require_data(policy, True, rope, shape.head_dim, f"model '{name}'")
        self._table = checked_table(policy.heads, self._request)
        # What is infeasible whatever the prompts are is refused before they are read.
        self._budgets = self._divide([0] * len(self._asked))
        self._prompts = np.zeros(0, np.int64)
        self._tokens: torch.Tensor | None = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows and free the others."""
        super().batch_select_indices(indices)
        rows = indices.cpu().numpy()
        if len(self._prompts):
            self._prompts = self._prompts[rows]
        if not self._one_budget:
            self._asked = [self._asked[row] for row in rows]

    @property
    def evicting_layers(self) -> list[EvictingLayer]:
        """The layers, once they have seen the prompts."""
        return [layer.entries for layer in self.layers if layer.entries is not None]

    @property
    def held(self) -> np.ndarray:
        """Entries of each sequence during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return np.sum([layer.held for layer in self.evicting_layers], axis=0)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all pools: keys and values."""
        return sum(layer.pool.bytes_allocated for layer in self.evicting_layers)

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
        held, n_rows, length = self.layers[layer], query.shape[0], query.shape[2]
        waits, is_last = self.policy.divides_layers_again, layer == len(self.layers) - 1
        if held.entries is not None:
            if length > 1 and mask is not None and not mask[:, -length:].all():
                raise UserError("padding after the prompts cannot be left out; allowed: left-padded prompts")
            if length > 1 and waits:
                raise UserError(
                    f"policy '{self.policy.name}' moves budgets between layers and takes tokens one by one; "
                    f"found: {length} at once"
                )
            output = held.entries.step(query, key, value, self._new_tokens(length))
        else:
            self._require_rows(n_rows)
            prompts = prompt_lengths(mask, n_rows, length)
            if layer == 0:
                self._prompts, self._budgets = prompts, self._divide(prompts)
            budgets = np.broadcast_to(self._budgets[:, layer], n_rows)
            seeds = range(n_rows) if self._seeds is None else self._seeds
            table = None if self._table is None else self._table[layer]
            held.entries = self._layer_type(layer, self.policy, budgets, prompts, seeds, self._rope, table)
            output = held.entries.prefill(query, key, value, scale)
        if waits and is_last:
            self._divide_again()
        return output

    def note_tokens(self, token_ids: torch.Tensor | None) -> None:
        """Take note of the tokens about to be read, int (n_rows, n_new); None if nobody knows them."""
        self._tokens = token_ids

    def _new_tokens(self, length: int) -> np.ndarray | None:
        """Give the tokens being read, for triggers that wait for certain ones; int (n_rows, n_new)."""
        trigger = self.policy.trigger
        if not trigger.reads_tokens:
            return None
        if self._tokens is None:
            raise UserError(
                f"trigger '{trigger.name}' waits for certain tokens; found: a model fed without ids"
            )
        return self._tokens[:, -length:].detach().cpu().numpy()

    def _require_rows(self, n_rows: int) -> None:
        n_budgets = n_rows if self._one_budget else len(self._budgets)
        n_seeds = n_rows if self._seeds is None else len(self._seeds)
        for what, n_given in (("budgets", n_budgets), ("seeds", n_seeds)):
            if n_given != n_rows:
                raise UserError(f"{what} are given for {n_given} sequences; found: a batch of {n_rows}")

    def _request_of(self, entries: int, prompt_tokens: int) -> LayerRequest:
        self.policy.require_feasible(entries, prompt_tokens)
        return replace(self._request, entries=entries, protected=self.policy.protected_of(prompt_tokens))

    def _divide(self, prompts: Sequence[int]) -> np.ndarray:
        """Give every row's budget per layer, int64 (n_rows or 1, n_layers)."""
        asked = self._asked * (len(prompts) if self._one_budget else 1)
        # Prompts matter only where they are kept.
        keys = [
            (entries, int(prompt) if self.policy.trigger.prompt == "keep" else 0)
            for entries, prompt in zip(asked, prompts, strict=True)
        ]
        found = {}
        for entries, prompt in set(keys):
            request = self._request_of(entries, prompt)
            found[entries, prompt] = (
                np.full(request.n_layers, entries)
                if self.policy.layers.dynamic
                else divide_over_layers(self.policy, request)[0]
            )
        return np.array([found[key] for key in keys])

    def _divide_again(self) -> None:
        """Divide the budgets of the rows whose time has come by what their layers hold, then compress."""
        layers = self.evicting_layers
        delta = self.policy.layers.layer_delta
        for row, (n_tokens, prompt) in enumerate(zip(layers[0].n_tokens, self._prompts, strict=True)):
            n_decoded = int(n_tokens - prompt)
            if n_decoded and not (delta and n_decoded % delta == 0):
                continue
            views = _Views(layers, row)
            request = self._request_of(self._asked[0 if self._one_budget else row], int(prompt))
            budgets, _ = divide_over_layers(self.policy, replace(request, views=views))
            for layer, entries in zip(layers, budgets.tolist(), strict=True):
                layer.resize(row, entries)
        for layer in layers:
            layer.compress_overdue()


class _Views(Sequence):
    """What every layer holds of one row, brought to the processor one layer at a time."""

    def __init__(self, layers: Sequence[EvictingLayer], row: int) -> None:
        self._layers, self._row = layers, row

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer):
        return self._layers[layer].views(self._row)


def prompt_lengths(mask: torch.Tensor | None, n_rows: int, length: int) -> np.ndarray:
    """Count each row's tokens, which have to stand at the end."""
    if mask is None:
        return np.full(n_rows, length)
    seen = mask[:, -length:].bool().cpu().numpy()
    prompts = seen.sum(1)
    if (seen != (np.arange(length) >= length - prompts[:, None])).any() or not prompts.all():
        raise UserError("the attention mask is not padding before each prompt; allowed: left padding")
    return prompts


def evict_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: object,
) -> tuple[torch.Tensor, None]:
    """Attend to what the module's cache holds; registered as ``kvbudget_evict``.

    Raises
    ------
    UserError
        For attention that is not a plain causal softmax over the whole history.
    """
    cache, layer = getattr(module, _ATTRIBUTE), module.layer_idx
    n_tokens = cache.layers[layer].get_seq_length()
    found = unsupported_feature(module, settings, n_tokens, dropout)
    if found:
        raise UserError(
            f"layer {layer} ({type(module).__name__}) has {found}; only plain causal attention can evict"
        )
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    # What is evicted has no gradient.
    heads = query.detach(), key.detach(), value.detach()
    output = cache.attend(layer, *heads, attention_mask, float(scaling))
    return output.transpose(1, 2).contiguous(), None


def padding_mask(*_: object, attention_mask: torch.Tensor | None = None, **__: object) -> torch.Tensor | None:
    """Hand the padding mask on as it is, (n_rows, length): causality is attention's own business."""
    return attention_mask


@contextmanager
def evicting(model: PreTrainedModel, cache: EvictingCache) -> Iterator[EvictingCache]:
    """Let ``model`` attend through ``cache``; on leaving, the model is as it was.

    ``model(input_ids, past_key_values=cache)`` and ``model.generate(**inputs, past_key_values=cache)`` then
    decode under its budget. The first call brings the whole prompts.

    Raises
    ------
    UserError
        When the model's attention cannot be replaced.
    """
    AttentionInterface.register(IMPLEMENTATION, evict_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
    with replaced_attention(model, IMPLEMENTATION, _ATTRIBUTE, cache):
        handle = model.register_forward_pre_hook(partial(_note_tokens, cache), with_kwargs=True)
        try:
            yield cache
        finally:
            handle.remove()


def _note_tokens(cache: EvictingCache, _: torch.nn.Module, given: tuple, named: dict) -> None:
    cache.note_tokens(named.get("input_ids", given[0] if given else None))
