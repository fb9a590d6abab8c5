"""A transformers cache whose entries are evicted by a policy while the model decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from simulator.policies.base import LayerRequest
from simulator.policy import Policy
from simulator.request import divide_over_layers
from simulator.wave import Wave, known_waves
from traces.errors import UserError
from validate.attention import replaced_attention, unsupported_feature
from validate.eviction.layer import EvictingLayer

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
        self._n_seen += key_states.shape[2]
        return key_states, value_states

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
        n_layers = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[EvictingCacheLayer(layer) for layer in range(n_layers)])
        self.policy, self._seeds, self._layer_type = policy, seeds, layer_type
        self._one_budget = isinstance(entries, Integral)
        waves = known_waves() if waves is None else waves
        budgets = {}
        asked = [int(entries)] if isinstance(entries, Integral) else [int(entry) for entry in entries]
        for budget in set(asked):
            request = LayerRequest(n_layers, budget, policy.protected, name, revision, "", waves)
            budgets[budget], _ = divide_over_layers(policy, request)
        self._budgets = np.array([budgets[budget] for budget in asked])  # (n_rows or 1, n_layers)

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
        if held.entries is not None:
            if length > 1 and mask is not None and not mask[:, -length:].all():
                raise UserError("padding after the prompts cannot be left out; allowed: left-padded prompts")
            return held.entries.step(query, key, value)
        seeds = range(n_rows) if self._seeds is None else self._seeds
        for what, n_given in (
            ("budgets", n_rows if self._one_budget else len(self._budgets)),
            ("seeds", len(seeds)),
        ):
            if n_given != n_rows:
                raise UserError(f"{what} are given for {n_given} sequences; found: a batch of {n_rows}")
        budgets = np.broadcast_to(self._budgets[:, layer], n_rows)
        prompts = _prompt_lengths(mask, n_rows, length)
        held.entries = self._layer_type(layer, self.policy, budgets, prompts, seeds)
        return held.entries.prefill(query, key, value, scale)


def _prompt_lengths(mask: torch.Tensor | None, n_rows: int, length: int) -> np.ndarray:
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
        yield cache
