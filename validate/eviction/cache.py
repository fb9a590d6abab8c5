"""A transformers cache whose entries are evicted by a policy while the model decodes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from traces.documents import shown
from traces.errors import UserError
from validate.eviction.back_end import Heads
from validate.eviction.calls import watch_calls
from validate.eviction.face import PolicyCache, model_kind, new_plan
from validate.eviction.host.back_end import HostBackEnd
from validate.eviction.host.layer import EvictingLayer
from validate.models.attention_hook import layer_index, replaced_attention, scale_of, unsupported_feature

IMPLEMENTATION = "kvbudget_evict"
_ATTRIBUTE = "_kvbudget_evicting_cache"


Face = TypeVar("Face", bound=PolicyCache)


class EvictingCache(PolicyCache):
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

    back_end: HostBackEnd

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
        plan = new_plan(model, policy, entries, name=name, revision=revision, waves=waves, seeds=seeds)
        super().__init__(plan, HostBackEnd(plan, layer_type), prompt_tokens)

    @property
    def evicting_layers(self) -> list[EvictingLayer]:
        """The layers, once they have seen the prompts."""
        return self.back_end.layers


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
    # What is evicted has no gradient.
    heads = Heads(query.detach(), key.detach(), value.detach())
    output = cache.attend(layer, heads, attention_mask, scale_of(module, query, scaling))
    cache.calls.attended(layer)
    return output.transpose(1, 2).contiguous(), None


def padding_mask(*_: object, attention_mask: torch.Tensor | None = None, **__: object) -> torch.Tensor | None:
    """Hand the padding mask on as it is, (n_rows, length): causality is attention's own business."""
    return attention_mask


@contextmanager
def evicting(model: PreTrainedModel, cache: Face) -> Iterator[Face]:
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


def _require_own(model: PreTrainedModel, cache: PolicyCache) -> None:
    """Refuse a cache of another model, or that a model attends through already; note whose it is."""
    if not isinstance(cache, PolicyCache):
        raise UserError(f"cache is {shown(cache)}; allowed: an EvictingCache or a DeviceCache")
    if cache.calls.is_open:
        raise UserError("evicting(model, cache) is entered twice with one cache; allowed: leaving it first")
    found, allowed = model_kind(model), cache.plan.kind
    if found != allowed:
        raise UserError(f"the cache was made for a model of {allowed}; found: one of {found}")
    if cache.get_seq_length() and cache.owner is not None and cache.owner() is not model:
        raise UserError("the cache holds a text that another model has read; allowed: cache.reset()")
    cache.owner = weakref.ref(model)
