"""How much each key repeats the others (R-KV), kept up to date from one compression to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.duplicate_kernels import (
    LOST,
    add_similarity,
    carry_duplicates,
    find_duplicates,
    find_duplicates_again,
)
from simulator.kernels import increases
from simulator.scratch import scratch

# Keys whose products with all others are held at once: few enough to stay in the cache.
_BLOCK_KEYS = 128
# Added to the norm, as the published code does; it keeps a zero key finite.
_NORM_EPSILON = np.float32(1e-8)
_MEMO = "duplicates"


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """Which entries repeat which, among those held at a compression; arrays (n_entries,), in slot order.

    Attributes
    ----------
    threshold : float32
        Cosine above which, strictly, one key duplicates another.
    positions : int32
        Increasing.
    newest : int32
        Slot of each one's newest duplicate, -1 for none.
    inverse : float32
        Inverse norms of the keys.
    """

    threshold: np.float32
    positions: np.ndarray
    newest: np.ndarray
    inverse: np.ndarray


def redundancy(
    keys: np.ndarray,
    positions: np.ndarray,
    threshold: float,
    *,
    spare_column0: bool,
    memo: dict[str, Any] | None = None,
) -> np.ndarray:
    """Give each key's share of repetition, summing to 1.

    Parameters
    ----------
    keys : float32 (n_entries, head_dim)
    positions : int32 (n_entries,)
    threshold : float
    spare_column0 : bool
        Whether a key without duplicate spares slot 0.
    memo : dict, optional
        Of the KV head, for entries in time order: only what came since is compared with all.

    Returns
    -------
    float32 (n_entries,)
    """
    known = None if memo is None or not increases(positions) else memo.get(_MEMO)
    found = _find(keys, positions, np.float32(threshold), known)
    if memo is not None:
        memo[_MEMO] = found
    spared = found.newest
    if spare_column0:
        spared = np.where(spared < 0, np.int32(0), spared)
        spared[0] = found.newest[0]  # its own similarity does not count anyway
    means = np.empty(len(keys), np.float64)
    add_similarity(keys, found.inverse, spared, means)
    means /= len(keys)
    weights = np.exp(means - means.max())
    return (weights / weights.sum()).astype(np.float32)


def _find(
    keys: np.ndarray, positions: np.ndarray, threshold: np.float32, known: Duplicates | None
) -> Duplicates:
    n_entries = len(keys)
    newest, inverse = np.full(n_entries, -1, np.int32), np.empty(n_entries, np.float32)
    n_known = 0
    if known is not None and known.threshold == threshold:
        n_known = carry_duplicates(known.positions, known.newest, known.inverse, positions, newest, inverse)
    added = keys[n_known:]
    norms = np.sqrt(np.einsum("ij,ij->i", added, added, dtype=np.float32))
    np.divide(np.float32(1), norms + _NORM_EPSILON, out=inverse[n_known:])
    for first in range(n_known, n_entries, _BLOCK_KEYS):
        stop = min(first + _BLOCK_KEYS, n_entries)
        products = scratch(stop, stop - first)
        np.matmul(keys[:stop], keys[first:stop].T, out=products)
        find_duplicates(products, inverse[:stop], threshold, first, newest[:stop])
    lost = np.flatnonzero(newest[:n_known] == LOST)
    for first in range(0, len(lost), _BLOCK_KEYS):
        slots = lost[first : first + _BLOCK_KEYS]
        products = scratch(n_known, len(slots))
        np.matmul(keys[:n_known], keys[slots].T, out=products)
        again = np.empty(len(slots), np.int32)
        find_duplicates_again(products, inverse, threshold, slots, again)
        newest[slots] = again
    return Duplicates(threshold, positions.copy(), newest, inverse)
