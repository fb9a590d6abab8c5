"""The lightest level: the replay's decisions as a mask over one pass of the whole text.

Nothing is evicted and nothing is decided by the model. Every query sees what the replay retains at its step
in its layer and KV head, and what is computed from that feeds the layers above. Against the forced level it
lacks only that decisions follow from the changed queries and keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from simulator.engine.layer import Retained
from traces.trace import Trace
from validate.levels.divergence import Divergence, FullPredictions, decode_logits
from validate.models.attention_hook import layer_index, replaced_attention, require_plain, scale_of

_IMPLEMENTATION = "kvbudget_masked"
_ATTRIBUTE = "_kvbudget_masks"


@dataclass(frozen=True, slots=True)
class Masks:
    """Which entries every query of a text sees, by layer and KV head.

    Attributes
    ----------
    n_kv_heads : int
    retained : dict of (layer, KV head) to list of Retained
        After every compression, by time.
    """

    n_kv_heads: int
    retained: dict[tuple[int, int], list[Retained]]

    def of(self, layer: int, first: int, n_new: int) -> torch.Tensor:
        """Give what queries from token ``first`` on see; bool (n_kv_heads, n_new, first + n_new)."""
        n_seen = first + n_new
        causal = torch.ones(n_new, n_seen, dtype=torch.bool).tril(first)
        seen = causal.repeat(self.n_kv_heads, 1, 1)
        for kv_head in range(self.n_kv_heads):
            for kept in self.retained.get((layer, kv_head), ()):
                # In force for the token that is read next, until the compression after it.
                row = max(0, kept.n_tokens - first)
                if row < n_new:
                    is_kept = torch.zeros(kept.n_tokens, dtype=torch.bool)
                    is_kept[torch.from_numpy(kept.positions).long()] = True
                    seen[kv_head, row:, : kept.n_tokens] = is_kept
        return seen


def masks_of(retained: Iterable[Retained], n_kv_heads: int) -> Masks:
    """Order what a replay retained by layer and KV head."""
    by_head: dict[tuple[int, int], list[Retained]] = defaultdict(list)
    for kept in sorted(retained, key=lambda kept: kept.compression):
        by_head[kept.layer, kept.kv_head].append(kept)
    return Masks(n_kv_heads, dict(by_head))


def masked_divergence(
    model: PreTrainedModel, trace: Trace, retained: Iterable[Retained], full: FullPredictions
) -> Divergence:
    """Pass a trace's text through its model once, each head seeing what is retained for it.

    The pass begins at the first compression: before it every head sees everything.

    Parameters
    ----------
    model : PreTrainedModel
        The trace's own.
    trace : Trace
    retained : iterable of Retained
        Of a replay of this trace.
    full : FullPredictions
        Of this trace.

    Raises
    ------
    UserError
        When the model's attention cannot be replaced.
    """
    AttentionInterface.register(_IMPLEMENTATION, _attend_masked)
    masks = masks_of(retained, trace.shape.n_kv_heads)
    with replaced_attention(model, _IMPLEMENTATION, _ATTRIBUTE, masks):
        first = min((kept[0].n_tokens for kept in masks.retained.values()), default=trace.total_tokens)
        logits = decode_logits(model, trace, full.cache(first), first)
        return full.compare(logits, first - trace.prompt_tokens)


def _attend_masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from one text's new tokens to what its masks let them see; registered as ``kvbudget_masked``."""
    require_plain(module, settings, key.shape[2], dropout, "only plain causal attention can be masked")
    masks: Masks = getattr(module, _ATTRIBUTE)
    n_kv_heads, n_seen, n_new = masks.n_kv_heads, key.shape[2], query.shape[2]
    seen = masks.of(layer_index(module), n_seen - n_new, n_new).to(query.device)
    # KV heads become the batch, so that a group shares keys and mask without a copy.
    grouped = query[0].unflatten(0, (n_kv_heads, -1))
    shared = (-1, grouped.shape[1], -1, -1)
    output = scaled_dot_product_attention(
        grouped,
        key[0][:, None].expand(shared),
        value[0][:, None].expand(shared),
        attn_mask=seen[:, None],
        scale=scale_of(module, query, scaling),
    )
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous(), None
