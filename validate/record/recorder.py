"""Takes each layer's new queries, keys and log-sum-exp from attention to a trace writer."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from traces.errors import UserError
from traces.shape import ModelShape
from traces.writer import TraceWriter
from validate.models.attention_hook import LayerCall, probe_attention
from validate.models.load import dtype_name, model_shape


class TraceRecorder:
    """Hands every layer's new tokens to a writer, as soon as ``hold`` of them are there.

    Parameters
    ----------
    writer : TraceWriter
    hold : int
        Tokens of a layer that wait to be written together; 1 hands each on at once.
    """

    def __init__(self, writer: TraceWriter, hold: int = 1) -> None:
        self.writer = writer
        self.hold = hold
        n_layers = writer.shape.n_layers
        self._n_seen = [0] * n_layers
        self._n_held = [0] * n_layers
        self._held: list[list[list[torch.Tensor]]] = [[] for _ in range(n_layers)]

    def observe(self, call: LayerCall) -> None:
        """Take one layer's new tokens.

        Raises
        ------
        UserError
            When the call does not continue the tokens seen so far, or differs in type or scale.
        """
        n_tokens = call.queries.shape[1]
        self._n_seen[call.layer] += n_tokens
        self._check(call)
        arrays = [call.queries, call.keys[:, -n_tokens:], call.lse]
        if self.writer.with_values:
            arrays.append(call.values[:, -n_tokens:])
        if self._n_held[call.layer] + n_tokens < self.hold:
            # What waits must be a copy: a slice would keep the whole cache of this step alive.
            arrays = [array.clone() for array in arrays]
        self._held[call.layer].append(arrays)
        self._n_held[call.layer] += n_tokens
        if self._n_held[call.layer] >= self.hold:
            self._flush_layer(call.layer)

    def flush(self) -> None:
        """Hand over what is still held, layer by layer."""
        for layer, held in enumerate(self._held):
            if held:
                self._flush_layer(layer)

    def _flush_layer(self, layer: int) -> None:
        parts = zip(*self._held[layer], strict=True)
        # Heads are the first axis of all four arrays, tokens the second.
        arrays = [part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts]
        self._held[layer], self._n_held[layer] = [], 0
        self.writer.append(layer, *map(to_numpy, arrays))

    def _check(self, call: LayerCall) -> None:
        n_entries, n_seen = call.keys.shape[1], self._n_seen[call.layer]
        if n_entries != n_seen:
            raise UserError(
                f"layer {call.layer} attends to {n_entries} entries at {n_seen} tokens; "
                "only a full cache can be recorded"
            )
        found = (dtype_name(call.queries.dtype), dtype_name(call.keys.dtype), call.scale)
        expected = (self.writer.shape.dtype, self.writer.shape.dtype, self.writer.scale)
        if found != expected:
            raise UserError(
                f"layer {call.layer} has queries, keys and scale {found}; the trace has {expected}"
            )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as an array, bfloat16 as its uint16 bit patterns; copies only from a device."""
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def observed_shape(model: PreTrainedModel) -> tuple[ModelShape, float, int | None]:
    """Give the sizes and the scale that attention really uses, and the narrowest sliding window.

    Raises
    ------
    UserError
        When the model's attention cannot be recorded, or its layers differ.
    """
    calls = probe_attention(model)
    shape, scale = model_shape(model.config, calls[0].queries.dtype), calls[0].scale
    expected = (shape.n_query_heads, shape.n_kv_heads, shape.head_dim, scale)
    n_kv_heads = {call.keys.shape[0] for call in calls}
    if n_kv_heads == {shape.n_query_heads} != {shape.n_kv_heads}:
        raise UserError(
            f"num_key_value_heads of the configuration is {shape.n_kv_heads}, and attention has a KV head "
            f"for each of its {shape.n_query_heads} query heads; allowed: that number, or no such field"
        )
    for call in calls:
        found = (call.queries.shape[0], call.keys.shape[0], call.queries.shape[2], call.scale)
        if found != expected:
            raise UserError(
                f"layer {call.layer} has query heads, KV heads, head width and scale {found}; "
                f"a trace needs {expected} in all layers"
            )
    return shape, scale, min((call.window for call in calls if call.window), default=None)
