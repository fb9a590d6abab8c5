"""Replace a model's attention: the tap through which a recording sees every call, and the place to evict.

Whatever hangs on how transformers calls attention is here or in ``eviction/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel

from traces.errors import UserError
from validate.models.causal import causal_attention

IMPLEMENTATION = "kvbudget_record"
RECORDER_ATTRIBUTE = "_kvbudget_recorder"

# What a model may hand to its attention function that makes it more than a softmax of scale * q.k.
UNRECORDABLE = {
    "softcap": "soft-capped attention logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias on the attention logits",
    "indices": "sparse attention",
}


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of attention in one layer, without the batch axis.

    Attributes
    ----------
    layer : int
    queries : Tensor, shape (n_query_heads, n_tokens, head_dim)
        After RoPE, of the tokens of this call only.
    keys, values : Tensor, shape (n_kv_heads, n_entries, head_dim)
        The whole cache; the last ``n_tokens`` entries belong to this call.
    lse : Tensor, shape (n_query_heads, n_tokens), float32
    scale : float
    window : int or None
        Width of a sliding window that this call is too short to feel.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lse: torch.Tensor
    scale: float
    window: int | None


def record_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend and show the call to the recording; registered as ``kvbudget_record``.

    Raises
    ------
    UserError
        For attention that is not one sequence's plain causal softmax over the whole cache.
    """
    found = unsupported_feature(module, settings, key.shape[2], dropout) or _unrecordable_input(
        query, key, value, attention_mask
    )
    if found:
        raise UserError(
            f"layer {layer_index(module)} ({type(module).__name__}) has {found}; only plain causal "
            "attention of one sequence over its whole cache can be recorded"
        )
    scale = scale_of(module, query, scaling)
    output, lse = causal_attention(query[0], key[0], value[0], scale)
    call = LayerCall(
        layer=layer_index(module),
        queries=query[0],
        keys=key[0],
        values=value[0],
        lse=lse,
        scale=scale,
        window=settings.get("sliding_window"),
    )
    getattr(module, RECORDER_ATTRIBUTE)(call)
    return output.transpose(0, 1)[None].contiguous(), None


def scale_of(module: torch.nn.Module, query: torch.Tensor, scaling: float | None) -> float:
    """Give the factor on dot products: the call's, else the module's, else one over the width's root."""
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    return float(scaling)


def layer_index(module: torch.nn.Module) -> int:
    """Give the layer that an attention module belongs to."""
    return cast(int, module.layer_idx)


def unsupported_feature(
    module: torch.nn.Module, settings: Mapping[str, Any], n_tokens: int, dropout: float
) -> str | None:
    """Name what makes a call more than a causal softmax of ``scale * q.k`` over ``n_tokens``, if anything."""
    causal = settings.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attention that is not causal"
    if dropout:
        return f"attention dropout of {dropout}"
    window = settings.get("sliding_window")
    if window and n_tokens > window:
        return f"a sliding window of {window} entries, in force at {n_tokens} tokens"
    given = {"sinks": getattr(module, "sinks", None), **settings}
    return next((words for name, words in UNRECORDABLE.items() if given.get(name) is not None), None)


def require_plain(
    module: torch.nn.Module, settings: Mapping[str, Any], n_tokens: int, dropout: float, otherwise: str
) -> None:
    """Refuse a call that is more than `unsupported_feature` allows; ``otherwise`` says what is then not done.

    Raises
    ------
    UserError
    """
    found = unsupported_feature(module, settings, n_tokens, dropout)
    if found:
        raise UserError(f"layer {layer_index(module)} has {found}; {otherwise}")


def _unrecordable_input(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> str | None:
    """Name what keeps a call from being one sequence of grouped heads over its whole cache."""
    if attention_mask is not None:
        return "an attention mask of its own"
    if query.shape[0] != 1:
        return f"a batch of {query.shape[0]} sequences"
    if key.shape != value.shape or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        shapes = [tuple(tensor.shape[1:]) for tensor in (query, key, value)]
        return "queries {}, keys {} and values {}, which are not grouped heads of one width".format(*shapes)
    return None


def attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Find the attention module of every layer, in order.

    Raises
    ------
    UserError
        When not every layer is full attention.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(
            f"model type '{config.model_type}' has {', '.join(sorted(kinds))} layers; "
            "only full attention can be recorded or evict"
        )
    found = {
        layer_index(module): module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    }
    if sorted(found) != list(range(config.num_hidden_layers)):
        raise UserError(
            f"model type '{config.model_type}' has known attention modules in {len(found)} of its "
            f"{config.num_hidden_layers} layers; recording needs one in each"
        )
    return [found[layer] for layer in sorted(found)]


@contextmanager
def recording(model: PreTrainedModel, observe: Callable[[LayerCall], None]) -> Iterator[None]:
    """Show every attention call of ``model`` to ``observe``; on leaving, all is as it was.

    The tensors of a call may be views that change later.

    Raises
    ------
    UserError
        When the model's attention cannot be replaced, or the model is being recorded already.
    """
    AttentionInterface.register(IMPLEMENTATION, record_attention)
    with replaced_attention(model, IMPLEMENTATION, RECORDER_ATTRIBUTE, observe):
        yield


@contextmanager
def replaced_attention(
    model: PreTrainedModel, implementation: str, attribute: str, companion: object
) -> Iterator[None]:
    """Let a model in evaluation mode attend through a registered function; on leaving, all is as it was.

    Parameters
    ----------
    model : PreTrainedModel
    implementation : str
        Name under which the function is registered.
    attribute : str
        Of every attention module; the function finds ``companion`` there.
    companion : object

    Raises
    ------
    UserError
        When the model's attention cannot be replaced, or is in this way already.
    """
    layers = attention_layers(model)
    if any(hasattr(layer, attribute) for layer in layers):
        raise UserError(f"this model attends through {implementation} already; allowed: leaving that first")
    # Parents first: setting a configuration also sets those inside it.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    implementations = [config._attn_implementation for config in configs]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model.set_attn_implementation(implementation)
        if model.config.get_text_config()._attn_implementation != implementation:
            raise UserError(
                f"model type '{model.config.model_type}' does not let its attention be replaced; "
                "it can neither be recorded nor evict"
            )
        for layer in layers:
            setattr(layer, attribute, companion)
        yield
    finally:
        for layer in layers:
            if hasattr(layer, attribute):
                delattr(layer, attribute)
        for config, before in zip(configs, implementations, strict=True):
            config._attn_implementation = before
        for module, was_training in training:
            module.training = was_training


def probe_attention(model: PreTrainedModel) -> list[LayerCall]:
    """Run one token through the model and give each layer's attention call, in order.

    What cannot be recorded is refused here, before a file is opened or a prompt is read.

    Raises
    ------
    UserError
        As ``record_attention`` and ``recording``, or when a layer does not attend at all.
    """
    seen: list[LayerCall] = []
    ids = torch.tensor([[0]], device=model.device)
    with torch.inference_mode(), recording(model, seen.append):
        model(input_ids=ids, use_cache=False)
    calls = {call.layer: call for call in seen}
    n_layers = model.config.get_text_config().num_hidden_layers
    if sorted(calls) != list(range(n_layers)):
        raise UserError(
            f"model type '{model.config.model_type}' attends through the replaceable function in "
            f"{len(calls)} of its {n_layers} layers; recording needs all of them"
        )
    return [calls[layer] for layer in range(n_layers)]
