"""A trace from plain arrays: for small models, tests and data from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.foreign import as_numpy
from traces.lse import causal_lse
from traces.numbers import round_to_storage, to_float32
from traces.shape import ModelShape
from traces.trace import Trace
from traces.writer import TraceWriter

# Of NumPy or of another library; see `as_numpy`.
Layers = Any


def write_trace(
    path: str | Path,
    queries: Layers,
    keys: Layers,
    *,
    prompt_tokens: int,
    lse: Layers | None = None,
    values: Layers | None = None,
    sensitivity: Layers | None = None,
    draw_log_weights: Any = None,
    token_ids: Sequence[int] | np.ndarray | None = None,
    dtype: str = "float16",
    scale: float | None = None,
    model: str = "custom",
    origin: str = "synthetic",
    overwrite: bool = False,
    **provenance: Any,
) -> Trace:
    """Write a trace from arrays, rounding them to the storage type.

    Parameters
    ----------
    path : str or Path
        The directory to create, ``NAME.kvtrace``.
    queries : array or sequence of arrays
        Per layer (n_query_heads, total_tokens, head_dim); here as below NumPy's, or any with ``__array__`` or
        DLPack, such as a tensor.
    keys : array or sequence of arrays
        Per layer (n_kv_heads, total_tokens, head_dim).
    prompt_tokens : int
    lse : array or sequence of arrays, optional
        Per layer (n_query_heads, total_tokens); computed from the rounded queries and keys if
        not given.
    values : array or sequence of arrays, optional
        As ``keys``.
    sensitivity : array or sequence of arrays, optional
        Per layer (n_draws, n_query_heads, n_steps, head_dim), see ``Trace.sensitivity``.
    draw_log_weights : array, optional
        (n_draws, n_steps), see ``Trace.draw_log_weights``; goes with ``sensitivity``.
    token_ids : sequence of int, optional
        ``0, 1, 2, ...`` if not given.
    dtype : str
        Storage type; arrays already in it (bfloat16 as uint16 bits) are stored as they are.
    scale : float, optional
        ``head_dim ** -0.5`` if not given.
    model, origin : str
    overwrite : bool
        Replace a trace that is there.
    **provenance
        Further fields of `TraceWriter.finish`.

    Raises
    ------
    ValueError
        If shapes or counts disagree, or a number is not finite in the storage type.
    UserError
        If ``path`` cannot be written to.
    """
    for name, layers in {"queries": queries, "keys": keys}.items():
        if len(layers) == 0 or (first := as_numpy(layers[0], f"layer 0: {name}")).ndim != 3:
            found = "no layer" if len(layers) == 0 else f"shape {first.shape}"
            raise ValueError(f"{name}: {found} found; allowed: per layer (n_heads, total_tokens, head_dim)")
    for name, layers in {"keys": keys, "lse": lse, "values": values, "sensitivity": sensitivity}.items():
        if layers is not None and len(layers) != len(queries):
            raise ValueError(f"{name} has {len(layers)} layers; allowed: {len(queries)}")
    n_query_heads, n_tokens, head_dim = map(int, queries[0].shape)
    shape = ModelShape(len(queries), n_query_heads, int(keys[0].shape[0]), head_dim, dtype)
    writer = TraceWriter(path, shape, scale=scale, with_values=values is not None, overwrite=overwrite)
    with writer:
        for layer in range(shape.n_layers):
            stored_queries = _rounded(queries, layer, "queries", dtype)
            stored_keys = _rounded(keys, layer, "keys", dtype)
            if lse is None:
                layer_lse = causal_lse(
                    to_float32(stored_queries, dtype), to_float32(stored_keys, dtype), writer.scale
                )
            else:
                layer_lse = as_numpy(lse[layer], f"layer {layer}: lse").astype(np.float32)
            layer_values = None if values is None else _rounded(values, layer, "values", dtype)
            writer.append(layer, stored_queries, stored_keys, layer_lse, layer_values)
            if sensitivity is not None:
                writer.write_sensitivity(layer, as_numpy(sensitivity[layer], f"layer {layer}: sensitivity"))
        if draw_log_weights is not None:
            writer.write_draws(as_numpy(draw_log_weights, "draw_log_weights"))
        return writer.finish(
            np.arange(n_tokens) if token_ids is None else token_ids,
            prompt_tokens=prompt_tokens,
            model=model,
            origin=origin,
            **provenance,
        )


def _rounded(layers: Layers, layer: int, name: str, dtype: str) -> np.ndarray:
    what = f"layer {layer}: {name}"
    try:
        return round_to_storage(as_numpy(layers[layer], what), dtype)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(what) else f"{what}: {error}") from None
