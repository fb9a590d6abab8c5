"""Slow and obvious twins of what `traces` does, and traces to try it on."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np

from traces import Trace, write_trace

STORED = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}


def random_stored(rng, shape, dtype):
    """Draw finite numbers of a storage type, every exponent alike likely."""
    if dtype == "float32":
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype("<f4")
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    bits[(bits & exponent) == exponent] = 0x8001  # a subnormal in place of infinity and NaN
    return bits.view("<f2") if dtype == "float16" else bits


def small_trace(path, seed=0, n_layers=2, dtype="float16", n_tokens=24, with_values=True, **kw):
    """Write a trace of gaussian queries and keys, 4 query heads and 2 KV heads of 8."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((n_layers, 4, n_tokens, 8), dtype=np.float32)
    keys = rng.standard_normal((n_layers, 2, n_tokens, 8), dtype=np.float32)
    values = keys[:, :, ::-1] if with_values else None
    prompt_tokens = kw.pop("prompt_tokens", 7)
    n_draws = kw.pop("n_draws", 0)
    if n_draws:
        drawn = (n_layers, n_draws, 4, n_tokens - prompt_tokens, 8)
        kw["sensitivity"] = rng.standard_normal(drawn, dtype=np.float32)
        kw["draw_log_weights"] = -np.abs(rng.standard_normal((n_draws, n_tokens - prompt_tokens)))
    return write_trace(path, queries, keys, values=values, prompt_tokens=prompt_tokens, dtype=dtype, **kw)


def dense_attention(trace: Trace, layer: int):
    """Return weights (n_query_heads, t, j) and LSE (n_query_heads, t) in float64, T x T whole."""
    queries = trace.queries(layer).astype(np.float64)
    keys = np.repeat(trace.keys(layer).astype(np.float64), trace.shape.group_size, axis=0)
    logits = trace.scale * queries @ keys.transpose(0, 2, 1)
    n_tokens = trace.total_tokens
    logits[:, ~np.tril(np.ones((n_tokens, n_tokens), dtype=bool))] = -np.inf
    maximum = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total, (maximum + np.log(total))[..., 0]


def round_to_bfloat16(value: float) -> int:
    """Return the bits of the bfloat16 nearest to a float32, ties to even, by comparing both."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    lower = bits >> 16
    if bits & 0xFFFF == 0 or math.isinf(value):
        return lower
    upper = lower + 1  # one step away from zero, maybe infinity

    def number(half):
        exponent, fraction = (half >> 7) & 0xFF, half & 0x7F
        # Infinity takes part as the number that would follow the largest one.
        return math.ldexp(fraction + (128 if exponent else 0), max(exponent, 1) - 134)

    below = abs(value) - number(lower)
    above = number(upper) - abs(value)
    if below == above:
        return lower if lower % 2 == 0 else upper
    return lower if below < above else upper


def reseal(path: Path) -> None:
    """Rewrite sizes, checksums and identity of a trace whose files were changed on purpose."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (path / name).read_bytes()
        record["size"] = len(content)
        record["sha256"] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(
        json.dumps(signed(manifest | {"trace_id": naive_content_id(manifest)}))
    )


def signed(manifest: dict) -> dict:
    """Give a manifest with the digest of its other fields."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return rest | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def naive_content_id(manifest: dict) -> str:
    """Compute the trace_id from the JSON fields, as the format defines it."""
    shape = ("n_layers", "n_query_heads", "n_kv_heads", "head_dim", "dtype")
    content = {
        "format": "kvtrace",
        "version": 1,
        "shape": {name: manifest[name] for name in shape},
        "scale": manifest["scale"],
        "prompt_tokens": manifest["prompt_tokens"],
        "total_tokens": manifest["total_tokens"],
        "files": {name: record["sha256"] for name, record in manifest["files"].items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
