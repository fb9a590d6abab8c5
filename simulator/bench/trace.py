"""A trace to time replays on: shaped like a model's, and quickly drawn however long it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from traces.numbers import round_to_storage
from traces.shape import ModelShape
from traces.trace import Trace
from traces.writer import TraceWriter

PROMPT_TOKENS = 128
_CHUNK = 2048
# Tokens over which a key's direction wanders off.
_HORIZON = 64
_LSE_SAMPLE = 512


def eight_billion(n_layers: int) -> ModelShape:
    """Give the shape of layers of an 8B model: 32 query heads, 8 KV heads, head_dim 128, bfloat16."""
    return ModelShape(n_layers, n_query_heads=32, n_kv_heads=8, head_dim=128, dtype="bfloat16")


def write_bench_trace(path: Path, shape: ModelShape, total_tokens: int, seed: int = 0) -> Trace:
    """Write a trace whose queries look back along a random walk of keys.

    Its log-sum-exps are estimated from a sample of the keys, since exact ones cost far more than any replay:
    the attention masses that come of it are no one's, while times do not depend on them.

    Parameters
    ----------
    path : Path
        The directory to create, ``NAME.kvtrace``.
    shape : ModelShape
    total_tokens : int
        Above ``PROMPT_TOKENS``.
    seed : int
    """
    with TraceWriter(path, shape) as writer:
        for layer in range(shape.n_layers):
            rng = np.random.default_rng([seed, layer])
            keys = _walk(rng, (shape.n_kv_heads, total_tokens, shape.head_dim))
            for start in range(0, total_tokens, _CHUNK):
                stop = min(start + _CHUNK, total_tokens)
                queries, lse = _queries(rng, shape, keys[:, :stop], start, writer.scale)
                stored = round_to_storage(keys[:, start:stop], shape.dtype)
                writer.append(layer, round_to_storage(queries, shape.dtype), stored, lse)
        return writer.finish(
            np.arange(total_tokens) % 1000,
            prompt_tokens=PROMPT_TOKENS,
            model="bench",
            origin="synthetic",
            seed=seed,
        )


def _walk(rng: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Draw keys with unit variance: half a walk along positions, half noise of their own."""
    memory = math.exp(-1 / _HORIZON)
    keys = rng.standard_normal(sizes, np.float32)
    half = sizes[-1] // 2
    steps = keys[..., :half] * np.float32(math.sqrt(1 - memory**2))
    keys[..., :half] = lfilter([1.0], [1.0, -memory], steps, axis=1)
    return keys


def _queries(
    rng: np.random.Generator, shape: ModelShape, keys: np.ndarray, start: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the queries from position ``start`` on, near their own keys, and estimate their LSE."""
    n_tokens, n_kv_heads = keys.shape[1] - start, shape.n_kv_heads
    queries = rng.standard_normal((n_kv_heads, shape.group_size, n_tokens, shape.head_dim), np.float32)
    queries += keys[:, np.newaxis, start:]
    queries = queries.reshape(shape.n_query_heads, n_tokens, shape.head_dim)
    sample = keys[:, :: -(-keys.shape[1] // _LSE_SAMPLE)]  # (n_kv_heads, n_sample, head_dim)
    lse = np.empty((shape.n_query_heads, n_tokens), np.float32)
    for head in range(shape.n_query_heads):
        logits = queries[head] @ sample[head // shape.group_size].T * np.float32(scale)
        lse[head] = np.log(np.exp(logits).mean(axis=1)) + np.log(np.arange(start, start + n_tokens) + 1)
    return queries, lse
