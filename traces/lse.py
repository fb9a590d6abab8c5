"""Log-sum-exp of every query over the full causal cache, block by block."""

from __future__ import annotations

import numpy as np

_QUERY_BLOCK = 256
_KEY_BLOCK = 1024


def causal_lse(queries: np.ndarray, keys: np.ndarray, scale: float, start: int = 0) -> np.ndarray:
    """Compute ``log(sum over j <= t of exp(scale * q_t . k_j))`` for every query.

    Parameters
    ----------
    queries : np.ndarray
        float32 (n_query_heads, n, head_dim) of the tokens ``start`` to ``start + n``.
    keys : np.ndarray
        float32 (n_kv_heads, start + n, head_dim).
    scale : float
        Attention scale.
    start : int
        Position of the first query.

    Returns
    -------
    np.ndarray
        float32 (n_query_heads, n).

    Raises
    ------
    ValueError
        If the shapes do not fit together.
    """
    n_query_heads, n, head_dim = queries.shape
    n_kv_heads = keys.shape[0]
    if keys.shape != (n_kv_heads, start + n, head_dim) or n_query_heads % n_kv_heads:
        raise ValueError(
            f"keys have shape {keys.shape}, queries {queries.shape}; allowed: "
            f"(n_kv_heads, {start + n}, {head_dim}) with n_kv_heads dividing {n_query_heads}"
        )
    group_size = n_query_heads // n_kv_heads
    result = np.empty((n_query_heads, n), dtype=np.float32)
    for kv_head in range(n_kv_heads):
        heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
        for first in range(0, n, _QUERY_BLOCK):
            block = queries[heads, first : first + _QUERY_BLOCK] * np.float32(scale)
            result[heads, first : first + _QUERY_BLOCK] = _block_lse(block, keys[kv_head], start + first)
    return result


def _block_lse(queries: np.ndarray, keys: np.ndarray, start: int) -> np.ndarray:
    """Return the LSE of scaled queries (group_size, n, head_dim) of tokens from ``start``."""
    group_size, n, head_dim = queries.shape
    rows = queries.reshape(group_size * n, head_dim)
    maximum = np.full((group_size * n, 1), -np.inf, dtype=np.float32)
    total = np.zeros((group_size * n, 1), dtype=np.float64)
    for first in range(0, start + n, _KEY_BLOCK):
        stop = min(first + _KEY_BLOCK, start + n)
        logits = rows @ keys[first:stop].T  # (group_size * n, stop - first)
        if stop - 1 > start:
            future = np.arange(first, stop) > np.arange(start, start + n)[:, np.newaxis]
            logits.reshape(group_size, n, stop - first)[:, future] = -np.inf
        # Position 0 is in the first block and in nobody's future: the maximum is finite from there.
        previous = maximum
        maximum = np.maximum(maximum, logits.max(axis=1, keepdims=True))
        total *= np.exp(previous - maximum)
        logits -= maximum
        total += np.exp(logits, out=logits).sum(axis=1, keepdims=True)
    return (maximum + np.log(total)).astype(np.float32).reshape(group_size, n)
