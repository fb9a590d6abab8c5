"""Compiled loops over keys that repeat others: arrays and scalars in, arrays out."""

from __future__ import annotations

import numpy as np
from numba import njit

from simulator.kernels import VECTORISE

# Stands for a slot that was known and is held no more.
LOST = -2


@njit(nogil=True, cache=True)
def carry_duplicates(before, newest_before, inverse_before, positions, newest, inverse):
    """Bring what is known of entries to the slots they have now; give how many entries are known.

    Parameters
    ----------
    before : int32 (n_before,)
        Positions of the entries known, increasing.
    newest_before : int32 (n_before,)
        Slot of each one's newest duplicate then, -1 for none.
    inverse_before : float32 (n_before,)
        Inverse norms of their keys.
    positions : int32 (n_entries,)
        Positions held now, increasing: some of the known ones, then others.
    newest : int32 (n_entries,)
        Written for known entries: the duplicate's slot now, -1 for none, ``LOST`` if it was evicted.
    inverse : float32 (n_entries,)
        Written for known entries.
    """
    moved = np.full(before.shape[0], LOST, np.int32)
    n_known = 0
    for slot in range(before.shape[0]):
        if n_known < positions.shape[0] and positions[n_known] == before[slot]:
            moved[slot] = n_known
            n_known += 1
    for slot in range(before.shape[0]):
        if moved[slot] >= 0:
            duplicate = newest_before[slot]
            newest[moved[slot]] = moved[duplicate] if duplicate >= 0 else -1
            inverse[moved[slot]] = inverse_before[slot]
    return n_known


@njit(nogil=True, cache=True)
def find_duplicates(products, inverse, threshold, first, newest):
    """Find the newest duplicates that a block of entries brings, of its own entries and of all before.

    Parameters
    ----------
    products : float32 (first + n_block, n_block)
        Dot products of all keys so far, in slot order, with those of slots ``first`` onwards.
    inverse : float32 (first + n_block,)
        Inverse norms of the keys.
    threshold : float32
        Cosine above which, strictly, one key duplicates another.
    first : int
    newest : int32 (first + n_block,)
        Slot of the newest duplicate, negative where none is known; updated.
    """
    for j in range(products.shape[0]):
        # A pair counts once, seen from its earlier entry: the later ones of the block begin here.
        after = max(0, j + 1 - first)
        later, scales, found = products[j, after:], inverse[first + after :], newest[first + after :]
        own, last = inverse[j], np.int32(-1)
        for i in range(later.shape[0]):
            is_duplicate = later[i] * own * scales[i] > threshold
            # Earlier entries come in slot order, so that the last to write is the newest.
            found[i] = np.int32(j) if is_duplicate else found[i]
            last = max(last, np.int32(i) if is_duplicate else np.int32(-1))
        if last >= 0:
            newest[j] = first + after + last


@njit(nogil=True, cache=True)
def find_duplicates_again(products, inverse, threshold, slots, newest):
    """Find the newest duplicate, among leading entries, of those that lost theirs.

    ``products`` is float32 (n_leading, n_slots) with the keys at ``slots``, int64 (n_slots,); ``inverse``
    float32 holds all keys' inverse norms; ``newest`` int32 (n_slots,) is written, -1 for none.
    """
    newest[:] = -1
    scales = inverse[slots]
    for j in range(products.shape[0]):
        own = inverse[j]
        for i in range(slots.shape[0]):
            is_duplicate = (products[j, i] * own * scales[i] > threshold) & (slots[i] != j)
            newest[i] = np.int32(j) if is_duplicate else newest[i]


@njit(nogil=True, cache=True, fastmath=VECTORISE)
def add_similarity(keys, inverse, newest, sums):
    """Write how similar all other keys are to each, where every key spares its newest duplicate.

    The sum of a key's cosines is its product with the sum of all unit keys; what does not count is taken off.

    Parameters
    ----------
    keys : float32 (n_entries, head_dim)
    inverse : float32 (n_entries,)
        Inverse norms of the keys.
    newest : int32 (n_entries,)
        Slot of the entry that each one spares, negative for none.
    sums : float64 (n_entries,)
        Written.
    """
    n_entries, head_dim = keys.shape
    total = np.zeros(head_dim, np.float64)
    for j in range(n_entries):
        for d in range(head_dim):
            total[d] += np.float64(keys[j, d] * inverse[j])
    for j in range(n_entries):
        product, square = np.float64(0.0), np.float32(0.0)
        for d in range(head_dim):
            product += total[d] * keys[j, d]
            square += keys[j, d] * keys[j, d]
        sums[j] = (product - np.float64(square * inverse[j])) * inverse[j]
    for j in range(n_entries):
        spared = newest[j]
        if spared >= 0:
            product32 = np.float32(0.0)
            for d in range(head_dim):
                product32 += keys[j, d] * keys[spared, d]
            sums[spared] -= product32 * inverse[j] * inverse[spared]
