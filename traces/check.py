"""Every invariant of a trace, checked: checksums, numbers, and the LSE against q . k."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from traces.errors import TraceError
from traces.lse import causal_lse
from traces.manifest import DRAWS_NAME, layer_name, sensitivity_dtype, sensitivity_name
from traces.numbers import all_finite, to_float32
from traces.trace import ARRAY_NAMES, Trace

_CHUNK_BYTES = 4 * 2**20
_TOKENS_A_SAMPLE = 64
_TOLERANCES = {"float16": 1e-3, "bfloat16": 1e-3, "float32": 1e-4}


def check_trace(
    trace: Trace, samples: int | None = 64, seed: int = 0, on_layer: Callable[[], None] = lambda: None
) -> list[str]:
    """Check every invariant of a trace.

    Parameters
    ----------
    trace : Trace
    samples : int, optional
        How many log-sum-exps to recompute in float64 at least, at random (layer, query head, token); every
        layer has one of 64 tokens at least, and always the first and last token and both sides of the
        prompt's end. All of them if it is None, at the cost of a full cache's attention.
    seed : int
        Chooses the samples.
    on_layer : callable
        Called after every layer, for progress.

    Returns
    -------
    list of str
        The facts that were checked, and what could not be; one sentence each.

    Raises
    ------
    TraceError
        On the first invariant that is violated.
    """
    return [
        _check_identity(trace),
        _check_checksums(trace),
        _check_token_ids(trace),
        _check_finite(trace),
        _check_lse(trace, samples, seed, on_layer),
    ]


def _check_identity(trace: Trace) -> str:
    # Held against its digest when it was opened.
    if trace.manifest.manifest_sha256 is None:
        return "the manifest has no digest: model, RoPE, task and vocabulary cannot be verified"
    return "the manifest agrees with its digest"


def _check_checksums(trace: Trace) -> str:
    n_files = n_bytes = 0
    for name, record in trace.manifest.all_files.items():
        path = trace.path / name
        try:
            size, sha256 = _digest(path)
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
        if size != record["size"]:
            raise TraceError(f"{path}: {size} bytes found; the manifest says {record['size']}")
        if sha256 != record["sha256"]:
            raise TraceError(f"{path}: sha256 {sha256} found; the manifest says {record['sha256']}")
        n_files, n_bytes = n_files + 1, n_bytes + size
    return f"sizes and checksums of {n_files} files agree ({n_bytes} bytes)"


def _check_token_ids(trace: Trace) -> str:
    token_ids = trace.token_ids
    if token_ids.min() < 0:
        position = int(token_ids.argmin())
        raise TraceError(
            f"{trace.path}: token id {token_ids[position]} at position {position}; allowed: 0 up"
        )
    return f"{len(token_ids)} token ids are valid ({trace.prompt_tokens} of them the prompt)"


def _check_finite(trace: Trace) -> str:
    names = [name for name in ARRAY_NAMES if name != "values" or trace.has_values]
    for layer in range(trace.shape.n_layers):
        for name in names:
            dtype = "float32" if name == "lse" else trace.shape.dtype
            for head, array in enumerate(trace.stored(layer, name)):
                if not all_finite(array, dtype):
                    raise TraceError(
                        f"{trace.path / layer_name(layer)}: {name} of head {head} hold NaN or "
                        "infinity; allowed: finite numbers"
                    )
        if trace.has_sensitivity:
            for draw, array in enumerate(trace.stored_sensitivity(layer)):
                if not all_finite(array, sensitivity_dtype(trace.shape.dtype)):
                    raise TraceError(
                        f"{trace.path / sensitivity_name(layer)}: draw {draw} holds NaN or infinity; "
                        "allowed: finite numbers"
                    )
    if trace.has_sensitivity:
        if not all_finite(trace.draw_log_weights, "float32"):
            raise TraceError(f"{trace.path / DRAWS_NAME}: NaN or infinity found; allowed: finite numbers")
        names.append("sensitivities")
    return f"all {', '.join(names)} are finite"


def _check_lse(trace: Trace, samples: int | None, seed: int, on_layer: Callable[[], None]) -> str:
    n_checked, largest = 0, 0.0
    rng = np.random.default_rng(seed)
    for layer in range(trace.shape.n_layers):
        for kv_head in range(trace.shape.n_kv_heads):
            heads = slice(kv_head * trace.shape.group_size, (kv_head + 1) * trace.shape.group_size)
            keys = to_float32(trace.stored(layer, "keys")[kv_head], trace.shape.dtype)
            found = trace.stored(layer, "lse")[heads]
            if samples is None:
                queries = to_float32(trace.stored(layer, "queries")[heads], trace.shape.dtype)
                computed = causal_lse(queries, keys[None], trace.scale)
                at = np.indices(found.shape).reshape(2, -1)
            else:
                at = _draw_samples(trace, samples, rng)
                computed = _exact_lse(trace, layer, heads, at, keys)
            differences = np.abs(found[tuple(at)] - computed.reshape(-1))
            bad = ~(differences <= _TOLERANCES[trace.shape.dtype] * (1 + np.abs(computed.reshape(-1))))
            if bad.any():
                head, token = at[:, bad.argmax()].tolist()
                raise TraceError(
                    f"{trace.path / layer_name(layer)}: lse of query head {heads.start + head}, "
                    f"token {token} is {found[head, token]:.6g}; its {token + 1} past keys give "
                    f"{computed.reshape(-1)[bad.argmax()]:.6g}"
                )
            n_checked, largest = n_checked + at.shape[1], max(largest, float(differences.max()))
        on_layer()
    how, which = ("float32", "all ") if samples is None else ("float64", "")
    return f"{which}{n_checked} log-sum-exps agree with q . k in {how} (largest difference {largest:.1e})"


def _draw_samples(trace: Trace, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw query heads of a group and tokens, int (2, n)."""
    shape, last = trace.shape, trace.total_tokens - 1
    # Where a recording is most easily wrong by one: both ends, and where decoding takes over.
    ends = sorted({0, trace.prompt_tokens - 1, min(trace.prompt_tokens, last), last})
    n = max(-(-samples // shape.n_layers), -(-trace.total_tokens // _TOKENS_A_SAMPLE))
    tokens = [*ends, *rng.integers(last + 1, size=max(0, -(-n // shape.n_kv_heads) - len(ends))).tolist()]
    return np.array([rng.integers(shape.group_size, size=len(tokens)), tokens])


def _exact_lse(trace: Trace, layer: int, heads: slice, at: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Recompute log-sum-exps of one group over keys (n_tokens, head_dim); float64 (n,)."""
    stored = trace.stored(layer, "queries")[heads][tuple(at)]  # (n, head_dim)
    queries = to_float32(stored, trace.shape.dtype).astype(np.float64)
    logits = trace.scale * queries @ keys[: at[1].max() + 1].astype(np.float64).T
    logits[np.arange(logits.shape[1]) > at[1][:, None]] = -np.inf
    highest = logits.max(axis=1)
    return highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))


def _digest(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
