"""The full cache of the slow twin: all its weights, and the best that any cache of a size could hold."""

from __future__ import annotations

import naive
from naive_rules import Rules


def dense_weights(trace):
    """Full attention, [layer][query head][token] to a list of weights."""
    layers = []
    for index in range(trace.shape.n_layers):
        arrays = trace.queries(index), trace.keys(index), trace.scale
        of_text = trace.prompt_tokens, Rules(), Rules()
        layers.append(naive.Layer(index, *arrays, *of_text, 1, 0, naive.Alone()).weights)
    return layers


def brute_oracle(trace, weights, held, step):
    """Take the best entries of all layers and KV heads by what their group gives them at one step."""
    shape, position = trace.shape, trace.prompt_tokens + step
    worth = []
    for layer in weights:
        for kv_head in range(shape.n_kv_heads):
            group = layer[kv_head * shape.group_size : (kv_head + 1) * shape.group_size]
            worth += [
                sum(head[position][j] for head in group) / shape.group_size for j in range(position + 1)
            ]
    return sum(sorted(worth, reverse=True)[:held]) / (shape.n_layers * shape.n_kv_heads)
