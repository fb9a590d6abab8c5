"""Compiled loops of attention and selection: arrays and scalars in, arrays out, no policies or traces."""

from __future__ import annotations

import numpy as np
from numba import njit

from simulator.kernels.compiled import compiled
from simulator.kernels.tiles import ROWS, WIDTH

# Sums may be reassociated so that they vectorise. NaN and infinity keep their meaning, and one machine
# always adds in the same order, so two runs are equal bit for bit.
VECTORISE = {"reassoc", "contract"}

_LOG2E = np.float32(1.4426950408889634)
# Minimax coefficients of 2**z that give 1 at 0; |z| <= 1/2 leaves a relative error below 1e-7, and rounding
# as much again.
_C1 = np.float32(0.6931469775932727)
_C2 = np.float32(0.24022242078878983)
_C3 = np.float32(0.055507337521310894)
_C4 = np.float32(0.009671512937712574)
_C5 = np.float32(0.0013264724480800364)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_LOWEST = np.float32(-126.0)

# Rows of a narrow array that are turned into columns at once.
_FEW_ENTRIES = 16


@njit(inline="always")
def exp(x):
    """Give e**x in float32, for x up to 88; below -87 the smallest normal number."""
    # np.exp does not vectorise here; a polynomial on the fractional power of two does, 20 times faster.
    y = max(x * _LOG2E, _LOWEST)
    whole = np.floor(y + _HALF)
    z = y - whole
    p = _C5 * z + _C4
    p = p * z + _C3
    p = p * z + _C2
    p = p * z + _C1
    p = p * z + _ONE
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)


@compiled(nogil=True, fastmath={"contract"})
def add_tile_mass(tile, scale, lse, mass):
    """Add the full-cache attention mass of a tile's entries to that of its queries.

    Parameters
    ----------
    tile : float32 (ROWS, WIDTH)
        Key-query dot products, unscaled; minus infinity where a query sees no entry, which adds 1e-38.
    scale : float32
    lse : float32 (WIDTH,)
        Log-sum-exp of each query over the full causal cache.
    mass : float32 (WIDTH,)
        Updated.
    """
    # Sizes known beforehand need no checks; two entries at once keep the sums in registers, and queries side
    # by side need no sum across lanes.
    for row in range(0, ROWS, 2):
        for query in range(WIDTH):
            # Subtract before scaling to base 2: the difference is small where the weight is large.
            shift = lse[query]
            mass[query] += exp(tile[row, query] * scale - shift) + exp(tile[row + 1, query] * scale - shift)


@compiled(nogil=True)
def add_tile_often(tile, scale, lse, mass, n_times):
    """Do ``add_tile_mass`` a number of times, to be timed."""
    for _ in range(n_times):
        add_tile_mass(tile, scale, lse, mass)


# A largest value vectorises only if NaN and the sign of zero may be ignored; products are finite.
@compiled(nogil=True, fastmath={"nnan", "nsz"})
def raise_strongest(tile, first_slot, largest, strongest):
    """Keep each query's largest product so far and its entry's slot, ties to the later one.

    Parameters
    ----------
    tile : float32 (ROWS, WIDTH)
        Dot products, minus infinity where a query sees no entry.
    first_slot : int
        Slot of the tile's first entry.
    largest : float32 (WIDTH,)
        Updated.
    strongest : int32 (WIDTH,)
        Updated.
    """
    # Few tiles bring a new largest product, and only those are looked through for it.
    n_raised = 0
    for query in range(WIDTH):
        most = tile[0, query]
        for row in range(1, ROWS):
            most = max(most, tile[row, query])
        n_raised += most >= largest[query]
    if n_raised:
        for query in range(WIDTH):
            for row in range(ROWS):
                if tile[row, query] >= largest[query] and tile[row, query] > -np.inf:
                    largest[query] = tile[row, query]
                    strongest[query] = first_slot + row


@compiled(nogil=True, fastmath={"nnan", "nsz"})
def max_pool(values, kernel_size, pooled):
    """Write the running maximum over ``kernel_size`` neighbours, cut at both ends; float32 (n,)."""
    n = values.shape[0]
    for j in range(n):
        pooled[j] = values[j]
    for shift in range(1, min(kernel_size // 2, n - 1) + 1):
        earlier, later = values[: n - shift], values[shift:]
        from_start, to_end = pooled[: n - shift], pooled[shift:]
        for j in range(n - shift):
            from_start[j] = max(from_start[j], later[j])
        for j in range(n - shift):
            to_end[j] = max(to_end[j], earlier[j])


@compiled(nogil=True, fastmath={"nnan", "nsz"})
def merge_logits(products, scale, n_merged, query_step, member_step, logits):
    """Write the largest of ``n_merged`` logits, less the largest of its row.

    ``products`` is float32 (n_entries, n_columns), where query ``i`` has the columns ``i * query_step``,
    ``i * query_step + member_step`` and so on; ``logits`` float32 (n_queries, n_entries) is written.
    """
    n_queries, n_entries = logits.shape
    for first in range(0, n_entries, _FEW_ENTRIES):
        some = products[first : first + _FEW_ENTRIES]
        for query in range(n_queries):
            merged, column = logits[query, first : first + _FEW_ENTRIES], query * query_step
            for j in range(merged.shape[0]):
                merged[j] = some[j, column]
            for member in range(1, n_merged):
                others = some[:, column + member * member_step :]
                for j in range(merged.shape[0]):
                    merged[j] = max(merged[j], others[j, 0])
    for query in range(n_queries):
        row = logits[query]
        largest = row[0]
        for j in range(n_entries):
            largest = max(largest, row[j])
        for j in range(n_entries):
            row[j] = row[j] * scale - largest * scale


@compiled(nogil=True, fastmath=VECTORISE)
def mean_weights(weights, n_merged, means):
    """Write each entry's mean weight, every row normalised to 1 and then ``n_merged`` of them merged.

    ``weights`` is float32 (n_merged * n_queries, n_entries), positive, and is normalised in place; of rows
    that differ by ``n_queries`` the largest counts. ``means`` float32 (n_entries,) is written.
    """
    n_rows, n_entries = weights.shape
    n_queries = n_rows // n_merged
    for row in range(n_rows):
        total = np.float32(0.0)
        for j in range(n_entries):
            total += weights[row, j]
        share = np.float32(1.0) / total
        for j in range(n_entries):
            weights[row, j] *= share
    means[:] = 0
    for query in range(n_queries):
        best = weights[query]
        for member in range(1, n_merged):
            other = weights[member * n_queries + query]
            for j in range(n_entries):
                best[j] = max(best[j], other[j])
        for j in range(n_entries):
            means[j] += best[j]
    for j in range(n_entries):
        means[j] /= np.float32(n_queries)


# These few keep the interpreter: to hand it to another thread and wait for it takes longer than they do.
@compiled()
def protect(scores, positions, n_leading, first_recent, checked):
    """Write scores with plus infinity where an entry is protected; give the first slot that is not finite.

    Protected are positions below ``n_leading`` and from ``first_recent`` on. All arrays are (n_entries,);
    -1 says that every score is finite.
    """
    bad = -1
    for slot in range(scores.shape[0] - 1, -1, -1):
        is_protected = positions[slot] < n_leading or positions[slot] >= first_recent
        checked[slot] = np.float32(np.inf) if is_protected else scores[slot]
        if not np.isfinite(scores[slot]):
            bad = slot
    return bad


@compiled()
def take_off(scores, weight, shares, share_weight):
    """Weight scores, float32 (n,), and take off leading shares, float32 (n or more,), with their weight."""
    for j in range(scores.shape[0]):
        scores[j] = weight * scores[j] - share_weight * shares[j]


@compiled()
def keep_best(scores, threshold, slots):
    """Write the slots of the best scores in slot order, ties to the later slot.

    ``threshold`` is the smallest score to keep, of which only so many are kept that ``slots``, int64
    (n_kept,), is full.
    """
    n_ties = slots.shape[0]
    for slot in range(scores.shape[0]):
        n_ties -= scores[slot] > threshold
    at = slots.shape[0]
    for slot in range(scores.shape[0] - 1, -1, -1):
        is_tie = scores[slot] == threshold and n_ties > 0
        if is_tie or scores[slot] > threshold:
            n_ties -= is_tie
            at -= 1
            slots[at] = slot


@compiled()
def increases(numbers):
    """Say whether each number is larger than the one before."""
    rises = True
    for i in range(1, numbers.shape[0]):
        rises &= numbers[i] > numbers[i - 1]
    return rises
