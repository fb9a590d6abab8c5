"""How much each key repeats the others (R-KV), kept up to date from one compression to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.kernels.duplicates import share_redundancy
from simulator.kernels.spans import addresses

# Added to the norm, as the published code does; it keeps a zero key finite.
_NORM_EPSILON = np.float32(1e-8)
_MEMO = "duplicates"


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """Which entries repeat which in a layer, among those held at a compression, in slot order.

    Attributes
    ----------
    threshold : float32
        Cosine above which, strictly, one key duplicates another.
    positions : int32 (n_kv_heads, n_most)
    lengths : int64 (n_kv_heads,)
        Entries of each KV head.
    newest : int32 (n_kv_heads, n_most)
        Slot of each one's newest duplicate, -1 for none.
    inverse : float32 (n_kv_heads, n_most)
        Inverse norms of the keys.
    """

    threshold: np.float32
    positions: np.ndarray
    lengths: np.ndarray
    newest: np.ndarray
    inverse: np.ndarray


def redundancy(
    keys: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    threshold: float,
    *,
    spare_column0: bool,
    memos: Sequence[dict[str, Any] | None],
) -> list[np.ndarray]:
    """Give each key's share of its KV head's repetition, summing to 1.

    Parameters
    ----------
    keys : sequence of float32 (n_entries, head_dim), one per KV head
    positions : sequence of int32 (n_entries,)
    threshold : float
    spare_column0 : bool
        Whether a key without duplicate spares slot 0.
    memos : sequence of dict or None
        Of the KV heads: if they were asked about together before, only what came since is compared with all.

    Returns
    -------
    list of float32 (n_entries,)
    """
    keys, limit = [np.ascontiguousarray(own) for own in keys], np.float32(threshold)
    lengths = np.array([len(own) for own in positions])
    shape = len(keys), int(lengths.max())
    found = Duplicates(
        limit, np.zeros(shape, np.int32), lengths, np.empty(shape, np.int32), np.empty(shape, np.float32)
    )
    for row, own in zip(found.positions, positions, strict=True):
        row[: len(own)] = own
    known = _recall(memos, limit) or _nothing(len(keys), limit)
    shares = np.empty(shape, np.float32)
    share_redundancy(
        addresses(keys),
        keys[0].shape[1],
        found.positions,
        lengths,
        (known.positions, known.lengths, known.newest, known.inverse),
        limit,
        _NORM_EPSILON,
        spare_column0,
        found.newest,
        found.inverse,
        shares,
    )
    for row, memo in enumerate(memos):
        if memo is not None:
            memo[_MEMO] = found, row
    return [own[:n] for own, n in zip(shares, lengths, strict=True)]


def _recall(memos: Sequence[dict[str, Any] | None], threshold: np.float32) -> Duplicates | None:
    """Give what the last call left in the memos, if it was asked about these KV heads."""
    noted = [None if memo is None else memo.get(_MEMO) for memo in memos]
    last = noted[0][0] if noted[0] else None
    if last is None or last.threshold != threshold:
        return None
    is_same = all(own is not None and own[0] is last and own[1] == row for row, own in enumerate(noted))
    return last if is_same else None


def _nothing(n_kv_heads: int, threshold: np.float32) -> Duplicates:
    empty = np.empty((n_kv_heads, 0), np.int32)
    return Duplicates(threshold, empty, np.zeros(n_kv_heads, np.int64), empty, empty.astype(np.float32))
