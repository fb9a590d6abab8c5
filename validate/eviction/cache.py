"""A transformers cache whose entries are evicted by a policy while the model decodes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from simulator.engine.request import divide_over_layers, require_data
from simulator.policies.contract import checked_table
from simulator.policies.language import Policy
from simulator.policies.parts import LayerRequest
from simulator.policies.view import CacheView
from simulator.policies.wave import Wave, known_waves
from traces.documents import shown
from traces.errors import UserError
from traces.shape import ModelShape
from validate.eviction.cache_layer import EvictingCacheLayer
from validate.eviction.calls import Calls, watch_calls
from validate.eviction.host.layer import EvictingLayer
from validate.eviction.prompts import attend_pass, prompt_lengths
from validate.models.attention_hook import layer_index, replaced_attention, unsupported_feature
from validate.models.load import model_shape, rope_parameters

IMPLEMENTATION = "kvbudget_evict"
_ATTRIBUTE = "_kvbudget_evicting_cache"
# Of entries and tokens; far above any, and within what arrays of the device count.
_MOST = 2**31 - 1


class EvictingCache(Cache):
    """The cache of one batch under a policy; use it within ``evicting``.

    Parameters
    ----------
    model : PreTrainedModel
    policy : Policy
    entries : int or sequence of int
        Mean budget in entries per KV head, of all sequences or of each.
    prompt_tokens : int, optional
        Length of the prompts, padding included, where they come in several passes of a loop by hand; without
        it the first pass is taken for the whole of them. ``generate`` tells it.
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
    UserError
        For an argument out of its range, and in use, for a call that is not meant for this cache.
    InfeasibleBudgetError, MissingDataError, PolicyError
        As ``divide_over_layers``.
    """

    _reads_values = True

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        entries: int | Sequence[int],
        *,
        prompt_tokens: int | None = None,
        name: str = "",
        revision: str = "",
        waves: dict[str, Wave] | None = None,
        seeds: Sequence[int] | None = None,
        layer_type: type[EvictingLayer] = EvictingLayer,
    ) -> None:
        if not isinstance(policy, Policy):
            raise UserError(f"policy is {shown(policy)}; allowed: what parse_policy gives")
        if prompt_tokens is not None:
            prompt_tokens = whole_number(prompt_tokens, "prompt_tokens", 1)
        if isinstance(entries, torch.Tensor):
            entries = entries.tolist()
        self._one_budget = isinstance(entries, Integral)
        self._asked = _whole_numbers([entries] if self._one_budget else entries, "entries", 1)
        self.shape, self.rope = shape, rope = _kind_of(model)
        self.own_layers = [EvictingCacheLayer(layer) for layer in range(shape.n_layers)]
        super().__init__(layers=[*self.own_layers])
        self.owner: weakref.ref[PreTrainedModel] | None = None
        self.calls = Calls(shape.n_layers, prompt_tokens, self._reads_values)
        self.policy, self._layer_type = policy, layer_type
        self._seeds = None if seeds is None else _whole_numbers(seeds, "seeds", 0)
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
        self._budgets = self._divide(np.zeros(len(self._asked), np.int64))
        self._prompts = np.zeros(0, np.int64)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *given: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new tokens on to attention; raises UserError outside of ``evicting``."""
        self.calls.hand_on(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *given, **named)

    def reset(self, prompt_tokens: int | None = None) -> None:
        """Forget the text; the next prompts have ``prompt_tokens`` tokens, if that is known."""
        if prompt_tokens is not None:
            prompt_tokens = whole_number(prompt_tokens, "prompt_tokens", 1)
        super().reset()
        self.calls.forget(prompt_tokens)
        self._prompts = np.zeros(0, np.int64)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows and free the others."""
        super().batch_select_indices(indices)
        self.calls.keep_rows(indices)
        rows = indices.cpu().numpy()
        if len(self._prompts):
            self._prompts = self._prompts[rows]
        if not self._one_budget:
            self._asked = [self._asked[row] for row in rows]
        if self._seeds is not None:
            self._seeds = [self._seeds[row] for row in rows]

    @property
    def evicting_layers(self) -> list[EvictingLayer]:
        """The layers, once they have seen the prompts."""
        return [layer.entries for layer in self.own_layers if layer.entries is not None]

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
        held, length = self.own_layers[layer], query.shape[2]
        waits, is_last = self.policy.divides_layers_again, layer == len(self.layers) - 1
        if held.entries is None:
            return self._read_prompts(layer, query, key, value, mask, scale)
        self.calls.require_certain_prompts(length)
        if length > 1 and mask is not None and not mask[:, -length:].all():
            raise UserError("padding after the prompts cannot be left out; allowed: left-padded prompts")
        if length > 1 and waits:
            raise UserError(
                f"policy '{self.policy.name}' moves budgets between layers and takes tokens one by one; "
                f"found: {length} at once"
            )
        output = held.entries.step(query, key, value, self._new_tokens(length))
        if waits and is_last:
            self._divide_again()
        return output

    def _read_prompts(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attend within the prompts, of which this pass is a part or the whole; evict once they are whole."""
        held, n_new = self.own_layers[layer], query.shape[2]
        n_seen = held.get_seq_length() - n_new
        prompt_tokens = self.calls.require_part_of_prompts(n_seen, n_new)
        if n_seen + n_new < prompt_tokens or held.passes:
            held.passes.append((query, key, value))
            query, key, value = (torch.cat(parts, 2) for parts in zip(*held.passes, strict=True))
        if query.shape[2] < prompt_tokens:
            return attend_pass(query[:, :, -n_new:], key, value, mask, scale)
        held.passes, n_rows = [], query.shape[0]
        self._require_rows(n_rows)
        prompts = prompt_lengths(mask, n_rows, query.shape[2])
        if layer == 0:
            self._prompts, self._budgets = prompts, self._divide(prompts)
        budgets = np.broadcast_to(self._budgets[:, layer], n_rows)
        seeds = range(n_rows) if self._seeds is None else self._seeds
        table = None if self._table is None else self._table[layer]
        held.entries = self._layer_type(layer, self.policy, budgets, prompts, seeds, self._rope, table)
        output = held.entries.prefill(query, key, value, scale)
        if self.policy.divides_layers_again and layer == len(self.layers) - 1:
            self._divide_again()
        return output[:, :, -n_new:]

    def _new_tokens(self, length: int) -> np.ndarray | None:
        """Give the tokens being read, for triggers that wait for certain ones; int (n_rows, n_new)."""
        trigger = self.policy.trigger
        if not trigger.reads_tokens:
            return None
        if self.calls.tokens is None:
            raise UserError(
                f"trigger '{trigger.name}' waits for certain tokens; found: a model fed without ids"
            )
        return self.calls.tokens[:, -length:].detach().cpu().numpy()

    def _require_rows(self, n_rows: int) -> None:
        n_budgets = n_rows if self._one_budget else len(self._asked)
        n_seeds = n_rows if self._seeds is None else len(self._seeds)
        for what, n_given in (("budgets", n_budgets), ("seeds", n_seeds)):
            if n_given != n_rows:
                raise UserError(f"{what} are given for {n_given} sequences; found: a batch of {n_rows}")

    def _request_of(self, entries: int, prompt_tokens: int) -> LayerRequest:
        self.policy.require_feasible(entries, prompt_tokens)
        return replace(self._request, entries=entries, protected=self.policy.protected_of(prompt_tokens))

    def _divide(self, prompts: np.ndarray) -> np.ndarray:
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


class _Views(Sequence[Sequence[CacheView]]):
    """What every layer holds of one row, brought to the processor one layer at a time."""

    def __init__(self, layers: Sequence[EvictingLayer], row: int) -> None:
        self._layers, self._row = layers, row

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, layer: int) -> Sequence[CacheView]: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Sequence[CacheView]]: ...
    def __getitem__(self, layer: int | slice) -> Sequence[CacheView] | Sequence[Sequence[CacheView]]:
        if isinstance(layer, slice):
            return [own.views(self._row) for own in self._layers[layer]]
        return self._layers[layer].views(self._row)


def _require_own(model: PreTrainedModel, cache: EvictingCache) -> None:
    """Refuse a cache of another model, or that a model attends through already; note whose it is."""
    if not isinstance(cache, EvictingCache):
        raise UserError(f"cache is {shown(cache)}; allowed: an EvictingCache or a DeviceCache")
    if cache.calls.is_open:
        raise UserError("evicting(model, cache) is entered twice with one cache; allowed: leaving it first")
    found, allowed = _kind_of(model), (cache.shape, cache.rope)
    if found != allowed:
        raise UserError(f"the cache was made for a model of {allowed}; found: one of {found}")
    if cache.get_seq_length() and cache.owner is not None and cache.owner() is not model:
        raise UserError("the cache holds a text that another model has read; allowed: cache.reset()")
    cache.owner = weakref.ref(model)


def _kind_of(model: PreTrainedModel) -> tuple[ModelShape, dict[str, object]]:
    return model_shape(model.config, model.dtype), rope_parameters(model.config)


def whole_number(number: object, name: str, least: int) -> int:
    """Give an argument as an int; raises UserError if it is none, below ``least`` or beyond measure."""
    if (
        not isinstance(number, Integral)
        or isinstance(number, bool | np.bool_)
        or not least <= int(number) <= _MOST
    ):
        raise UserError(f"{name} has {shown(number)}; allowed: whole numbers, {least} or more")
    return int(number)


def _whole_numbers(given: object, name: str, least: int) -> list[int]:
    row = list(given) if isinstance(given, list | tuple | range) else []
    if isinstance(given, np.ndarray) and given.ndim == 1:
        row = list(given)
    if not row:
        raise UserError(f"{name} is {shown(given)}; allowed: a whole number, or one for each sequence")
    return [whole_number(number, name, least) for number in row]


def evict_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to what the module's cache holds; registered as ``kvbudget_evict``.

    Raises
    ------
    UserError
        For attention that is not a plain causal softmax over the whole history.
    """
    cache, layer = getattr(module, _ATTRIBUTE), layer_index(module)
    cache.calls.attend(layer, query.shape[2], key.shape[2])
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
    cache.calls.attended(layer)
    return output.transpose(1, 2).contiguous(), None


def padding_mask(*_: object, attention_mask: torch.Tensor | None = None, **__: object) -> torch.Tensor | None:
    """Hand the padding mask on as it is, (n_rows, length): causality is attention's own business."""
    return attention_mask


@contextmanager
def evicting(model: PreTrainedModel, cache: EvictingCache) -> Iterator[EvictingCache]:
    """Let ``model`` attend through ``cache``; on leaving, the model is as it was.

    ``model(input_ids, past_key_values=cache)`` and ``model.generate(**inputs, past_key_values=cache)`` then
    decode under its budget. Under one that evicts nothing they write what the model writes without it, token
    for token in float32, and in 16 bits as far as two implementations of attention agree.

    The first call brings the whole prompts, unless ``prompt_tokens`` says otherwise.
    Leaving and entering again goes on with the text; ``cache.reset()`` begins another.

    Raises
    ------
    UserError
        When the model's attention cannot be replaced, and from any call that is not one of these two kinds or
        does not continue the text in the cache.
    """
    _require_own(model, cache)
    AttentionInterface.register(IMPLEMENTATION, evict_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
    with replaced_attention(model, IMPLEMENTATION, _ATTRIBUTE, cache):
        end = watch_calls(model, cache, cache.calls)
        cache.calls.is_open = True
        try:
            yield cache
        finally:
            cache.calls.is_open = False
            end()
