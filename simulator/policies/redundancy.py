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
    invert_norms,
)
from simulator.kernels import increases

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
    keys, n_entries = np.ascontiguousarray(keys), len(keys)
    newest, inverse = np.full(n_entries, -1, np.int32), np.empty(n_entries, np.float32)
    n_known = 0
    if known is not None and known.threshold == threshold:
        n_known = carry_duplicates(known.positions, known.newest, known.inverse, positions, newest, inverse)
    invert_norms(keys[n_known:], _NORM_EPSILON, inverse[n_known:])
    find_duplicates(keys, inverse, threshold, n_known, newest)
    lost = np.flatnonzero(newest[:n_known] == LOST)
    if len(lost):
        find_duplicates_again(keys, n_known, inverse, threshold, lost, newest)
    return Duplicates(threshold, positions.copy(), newest, inverse)
