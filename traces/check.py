"""Every invariant of a trace, checked: checksums, numbers, and the LSE against q . k."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from traces.errors import TraceError
from traces.manifest import file_names, layer_name
from traces.numbers import all_finite, to_float32
from traces.trace import ARRAY_NAMES, Trace

_CHUNK_BYTES = 4 * 2**20
_TOLERANCES = {"float16": 1e-3, "bfloat16": 1e-3, "float32": 1e-4}


def check_trace(trace: Trace, samples: int = 64, seed: int = 0) -> list[str]:
    """Check every invariant of a trace.

    Parameters
    ----------
    trace : Trace
    samples : int
        How many log-sum-exps to recompute in float64, at random (layer, query head, token). The
        first and last token and both sides of the prompt's end are always among them, in every
        layer, so that there may be more.
    seed : int
        Chooses the samples.

    Returns
    -------
    list of str
        The facts that were checked, one sentence each.

    Raises
    ------
    TraceError
        On the first invariant that is violated.
    """
    return [
        _check_checksums(trace),
        _check_token_ids(trace),
        _check_finite(trace),
        _check_lse(trace, samples, seed),
    ]


def _check_checksums(trace: Trace) -> str:
    n_files = n_bytes = 0
    for name in file_names(trace.shape.n_layers):
        path, record = trace.path / name, trace.manifest.files[name]
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
    return f"all {', '.join(names)} are finite"


def _check_lse(trace: Trace, samples: int, seed: int) -> str:
    tolerance = _TOLERANCES[trace.shape.dtype]
    n_checked = 0
    largest = 0.0
    for layer, head, token in _draw_samples(trace, samples, seed):
        queries = trace.stored(layer, "queries")[head : head + 1, token : token + 1]
        keys = trace.stored(layer, "keys")[head // trace.shape.group_size, : token + 1]
        found = float(trace.stored(layer, "lse")[head, token])
        exact = _exact_lse(
            to_float32(queries, trace.shape.dtype)[0, 0],
            to_float32(keys, trace.shape.dtype),
            trace.scale,
        )
        difference = abs(found - exact)
        if not difference <= tolerance * (1 + abs(exact)):
            raise TraceError(
                f"{trace.path / layer_name(layer)}: lse of query head {head}, token {token} is "
                f"{found:.6g}; its {token + 1} past keys give {exact:.6g}"
            )
        n_checked, largest = n_checked + 1, max(largest, difference)
    return f"{n_checked} log-sum-exps agree with q . k in float64 (largest difference {largest:.1e})"


def _draw_samples(trace: Trace, samples: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Yield (layer, query head, token), layer by layer."""
    rng = np.random.default_rng(seed)
    shape, last = trace.shape, trace.total_tokens - 1
    # Where a recording is most easily wrong by one: both ends, and where decoding takes over.
    ends = {0, trace.prompt_tokens - 1, min(trace.prompt_tokens, last), last}
    n_random = max(0, samples - len(ends) * shape.n_layers)
    n_random_by_layer = rng.multinomial(n_random, [1 / shape.n_layers] * shape.n_layers)
    for layer in range(shape.n_layers):
        tokens = [*sorted(ends), *rng.integers(last + 1, size=n_random_by_layer[layer]).tolist()]
        for token in tokens:
            yield layer, int(rng.integers(shape.n_query_heads)), token


def _exact_lse(query: np.ndarray, keys: np.ndarray, scale: float) -> float:
    """Return the LSE of one query (head_dim,) over keys (n, head_dim), in float64."""
    logits = scale * (keys.astype(np.float64) @ query.astype(np.float64))
    maximum = logits.max()
    return float(maximum + np.log(np.exp(logits - maximum).sum()))


def _digest(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
