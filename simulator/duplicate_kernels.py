"""Compiled loops over keys that repeat others: arrays and scalars in, arrays out."""

from __future__ import annotations

import numpy as np

from simulator.compiled import compiled
from simulator.kernels import VECTORISE
from simulator.tiles import ROWS, WIDTH, fill_panel, multiply_tile

# Stands for a slot that was known and is held no more.
LOST = -2


@compiled(nogil=True)
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


@compiled(nogil=True, fastmath=VECTORISE)
def invert_norms(keys, epsilon, inverse):
    """Write the inverse of each key's norm and ``epsilon``; float32 (n, head_dim) and (n,)."""
    for j in range(keys.shape[0]):
        square = np.float32(0.0)
        for d in range(keys.shape[1]):
            square += keys[j, d] * keys[j, d]
        inverse[j] = np.float32(1.0) / (np.sqrt(square) + epsilon)


@compiled(nogil=True)
def find_duplicates(keys, inverse, threshold, first, newest):
    """Find the newest duplicates that added entries bring, among themselves and of all before.

    Parameters
    ----------
    keys : float32 (n_entries, head_dim)
        In slot order, row by row and without gaps.
    inverse : float32 (n_entries,)
        Inverse norms of the keys.
    threshold : float32
        Cosine above which, strictly, one key duplicates another.
    first : int
        Slot of the first added entry.
    newest : int32 (n_entries,)
        Slot of the newest duplicate, negative where none is known; updated.
    """
    n_entries, head_dim = keys.shape
    panel, rows = np.empty((head_dim, WIDTH), np.float32), np.zeros((WIDTH, head_dim), np.float32)
    tile, at = np.empty((ROWS, WIDTH), np.float32), keys.ctypes.data
    scales, found = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.int32)
    for start in range(first, n_entries, WIDTH):
        stop = min(start + WIDTH, n_entries)
        rows[: stop - start], scales[: stop - start] = keys[start:stop], inverse[start:stop]
        found[: stop - start] = newest[start:stop]
        fill_panel(rows, panel)
        for slot in range(0, stop, ROWS):
            n_rows = min(ROWS, stop - slot)
            multiply_tile(at + 4 * head_dim * slot, n_rows, panel, tile)
            for row in range(n_rows):
                # A pair counts once, seen from its earlier entry: the later ones of the panel begin here.
                own, after, last = inverse[slot + row], slot + row + 1 - start, np.int32(-1)
                for i in range(WIDTH):
                    is_later = (i >= after) & (i < stop - start)
                    is_duplicate = is_later & (tile[row, i] * (own * scales[i]) > threshold)
                    # Earlier entries come in slot order, so that the last to write is the newest.
                    found[i] = np.int32(slot + row) if is_duplicate else found[i]
                    last = max(last, np.int32(i) if is_duplicate else np.int32(-1))
                if last >= 0:
                    newest[slot + row] = start + last
                    if slot + row >= start:
                        found[slot + row - start] = start + last
        newest[start:stop] = found[: stop - start]


@compiled(nogil=True)
def find_duplicates_again(keys, n_leading, inverse, threshold, slots, newest):
    """Find the newest duplicate, among leading entries, of those that lost theirs.

    ``slots`` is int64 (n_slots,), of some of the ``n_leading`` entries; ``newest`` int32 (n_entries,) is
    written for them, -1 for none; others as of ``find_duplicates``.
    """
    head_dim = keys.shape[1]
    panel, rows = np.empty((head_dim, WIDTH), np.float32), np.zeros((WIDTH, head_dim), np.float32)
    tile, at = np.empty((ROWS, WIDTH), np.float32), keys.ctypes.data
    scales, found = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.int32)
    lost = np.full(WIDTH, -1, np.int64)
    for start in range(0, slots.shape[0], WIDTH):
        n_lost = min(WIDTH, slots.shape[0] - start)
        for i in range(n_lost):
            lost[i] = slots[start + i]
            rows[i], scales[i] = keys[lost[i]], inverse[lost[i]]
        found[:] = -1
        fill_panel(rows, panel)
        for slot in range(0, n_leading, ROWS):
            n_rows = min(ROWS, n_leading - slot)
            multiply_tile(at + 4 * head_dim * slot, n_rows, panel, tile)
            for row in range(n_rows):
                own = inverse[slot + row]
                for i in range(WIDTH):
                    is_duplicate = (tile[row, i] * (own * scales[i]) > threshold) & (lost[i] != slot + row)
                    found[i] = np.int32(slot + row) if is_duplicate else found[i]
        for i in range(n_lost):
            newest[lost[i]] = found[i]


@compiled(nogil=True, fastmath=VECTORISE)
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
