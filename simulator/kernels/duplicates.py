"""How much each key of a layer repeats the others (R-KV), kept up to date as entries come and go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray

from simulator.kernels.attention import VECTORISE
from simulator.kernels.compiled import compiled
from simulator.kernels.tiles import ROWS, WIDTH, can_pair, fill_panel, multiply
from simulator.kernels.widening import addresses, floats_at, narrow

# Stands for a slot that was known and is held no more.
LOST = -2


# Added to the norm, as the published code does; it keeps a zero key finite.
_NORM_EPSILON = np.float32(1e-8)


class Redundancy:
    """The redundancy of a layer's keys; asked again, only what came since is compared with all.

    Parameters
    ----------
    threshold : float
        Cosine above which, strictly, one key duplicates another.
    spare_column0 : bool
        Whether a key without duplicate spares slot 0.
    """

    def __init__(self, threshold: float, *, spare_column0: bool) -> None:
        self._threshold, self._spare_column0 = np.float32(threshold), spare_column0
        # Of the entries held when it was last asked: positions, how many, newest duplicates, inverse norms.
        self._before: tuple[np.ndarray, ...] | None = None

    def shares(self, keys: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Give each key's share of its KV head's repetition, summing to 1.

        Parameters
        ----------
        keys : sequence of float32 (n_entries, head_dim), one per KV head
            Of the same KV heads each time, where a position always has the same key.
        positions : sequence of int32 (n_entries,)

        Returns
        -------
        list of float32 (n_entries,)
        """
        keys = [np.ascontiguousarray(own) for own in keys]
        lengths = np.array([len(own) for own in positions])
        shape = len(keys), int(lengths.max())
        held = np.zeros(shape, np.int32)
        for row, own in zip(held, positions, strict=True):
            row[: len(own)] = own
        newest, inverse, shares = (
            np.empty(shape, np.int32),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
        )
        share_redundancy(
            addresses(keys),
            keys[0].shape[1],
            held,
            lengths,
            self._before or (held, np.zeros_like(lengths), newest, inverse),
            self._threshold,
            _NORM_EPSILON,
            self._spare_column0,
            newest,
            inverse,
            shares,
        )
        self._before = held, lengths, newest, inverse
        return [own[:n] for own, n in zip(shares, lengths, strict=True)]


@compiled(nogil=True)
def carry_duplicates(before, newest_before, inverse_before, positions, newest, inverse):
    """Bring what is known of entries to the slots they have now; give how many entries are known.

    Parameters
    ----------
    before : int32 (n_before,)
        Positions of the entries known.
    newest_before : int32 (n_before,)
        Slot of each one's newest duplicate then, -1 for none.
    inverse_before : float32 (n_before,)
        Inverse norms of their keys.
    positions : int32 (n_entries,)
        Positions held now: some of the known ones in their order, then others.
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
def find_duplicates(keys, depth, paired, inverse, threshold, first, newest):
    """Find the newest duplicates that added entries bring, among themselves and of all before.

    Parameters
    ----------
    keys : int
        Address of the keys in slot order, row by row and without gaps.
    depth, paired : int, bool
        Of their ``simulator.kernels.tiles.Form``.
    inverse : float32 (n_entries,)
        Inverse norms of the keys.
    threshold : float32
        Cosine above which, strictly, one key duplicates another.
    first : int
        Slot of the first added entry.
    newest : int32 (n_entries,)
        Slot of the newest duplicate, negative where none is known; updated.
    """
    n_entries = newest.shape[0]
    panel, tile = np.empty((depth, WIDTH), np.float32), np.empty((ROWS, WIDTH), np.float32)
    rows, scales, found = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.int32)
    for start in range(first, n_entries, WIDTH):
        stop = min(start + WIDTH, n_entries)
        for i in range(WIDTH):
            slot = min(start + i, stop - 1)
            rows[i], scales[i], found[i] = keys + 4 * depth * slot, inverse[slot], newest[slot]
        fill_panel(rows, panel)
        for slot in range(0, stop, ROWS):
            n_rows = min(ROWS, stop - slot)
            multiply(paired, keys + 4 * depth * slot, n_rows, panel, tile)
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
        for i in range(stop - start):
            newest[start + i] = found[i]


@compiled(nogil=True)
def find_duplicates_again(keys, depth, paired, n_leading, inverse, threshold, newest):
    """Find the newest duplicate, among leading entries, of those that lost theirs.

    Where ``newest``, int32 (n_entries,), is ``LOST`` within the ``n_leading`` entries it is written, -1 for
    none; others as of ``find_duplicates``.
    """
    slots = np.empty(n_leading, np.int64)
    n_slots = 0
    for slot in range(n_leading):
        slots[n_slots] = slot
        n_slots += newest[slot] == LOST
    panel, tile = np.empty((depth, WIDTH), np.float32), np.empty((ROWS, WIDTH), np.float32)
    rows, scales, found = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.int32)
    lost = np.empty(WIDTH, np.int64)
    for start in range(0, n_slots, WIDTH):
        for i in range(WIDTH):
            lost[i] = slots[min(start + i, n_slots - 1)]
            rows[i], scales[i] = keys + 4 * depth * lost[i], inverse[lost[i]]
        found[:] = -1
        fill_panel(rows, panel)
        for slot in range(0, n_leading, ROWS):
            n_rows = min(ROWS, n_leading - slot)
            multiply(paired, keys + 4 * depth * slot, n_rows, panel, tile)
            for row in range(n_rows):
                own = inverse[slot + row]
                for i in range(WIDTH):
                    is_duplicate = (tile[row, i] * (own * scales[i]) > threshold) & (lost[i] != slot + row)
                    found[i] = np.int32(slot + row) if is_duplicate else found[i]
        for i in range(WIDTH):
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


@compiled(nogil=True)
def share_redundancy(
    keys, head_dim, positions, lengths, before, threshold, epsilon, spare_column0, newest, inverse, shares
):
    """Write what ``Redundancy.shares`` gives to ``shares``, float32 (n_kv_heads, n_most).

    ``keys``, int64 (n_kv_heads,), are addresses of each head's keys, row by row; ``positions`` is int32
    (n_kv_heads, n_most). Also written are ``newest``, int32, with the slot of each one's newest duplicate, -1
    for none, and ``inverse``, float32, with the inverse norms of the keys: with ``positions`` and ``lengths``
    they are the next call's ``before``, whose lengths are 0 where nothing is known.
    """
    known_positions, known_lengths, known_newest, known_inverse = before
    may_pair = can_pair(head_dim)
    pairs = np.empty(positions.shape[1] * head_dim if may_pair else 0, np.uint16)
    for kv_head in range(keys.shape[0]):
        n = lengths[kv_head]
        if n == 0:
            continue
        held = carray(floats_at(keys[kv_head]), (n, head_dim))
        own, norms = newest[kv_head, :n], inverse[kv_head, :n]
        own[:] = -1
        n_before, n_known = known_lengths[kv_head], 0
        if n_before:
            n_known = carry_duplicates(
                known_positions[kv_head, :n_before],
                known_newest[kv_head, :n_before],
                known_inverse[kv_head, :n_before],
                positions[kv_head, :n],
                own,
                norms,
            )
        invert_norms(held[n_known:], epsilon, norms[n_known:])
        at, depth, paired = keys[kv_head], head_dim, False
        if may_pair and narrow(keys[kv_head], n * head_dim, pairs):
            at, depth, paired = np.int64(pairs.ctypes.data), head_dim // 2, True
        find_duplicates(at, depth, paired, norms, threshold, n_known, own)
        find_duplicates_again(at, depth, paired, n_known, norms, threshold, own)
        spared = np.empty(n, np.int32)
        for slot in range(n):
            # Slot 0's own similarity does not count anyway.
            spared[slot] = max(own[slot], 0) if spare_column0 and slot else own[slot]
        sums = np.empty(n, np.float64)
        add_similarity(held, norms, spared, sums)
        _normalise(sums, shares[kv_head, :n])
    pairs[:0] = 0  # they have to live until here: they are read by address


@compiled(nogil=True, fastmath=VECTORISE)
def _normalise(sums, shares):
    """Write the softmax of means over as many entries as there are sums; these are changed."""
    largest, total = sums[0], np.float64(0.0)
    for j in range(sums.shape[0]):
        largest = max(largest, sums[j])
    for j in range(sums.shape[0]):
        sums[j] = np.exp((sums[j] - largest) / sums.shape[0])
        total += sums[j]
    for j in range(sums.shape[0]):
        shares[j] = np.float32(sums[j] / total)
