"""Compiled loops of attention and selection: arrays and scalars in, arrays out, no policies or traces."""

from __future__ import annotations

import numpy as np
from numba import njit

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


@njit(nogil=True, cache=True, fastmath={"contract"})
def add_attention_mass(products, scale, lse, seen_from, mass):
    """Write each query's full-cache attention mass on the entries it can see.

    Parameters
    ----------
    products : float32 (n_entries, n_queries)
        Key-query dot products, unscaled; queries in time order.
    scale : float32
    lse : float32 (n_queries,)
        Log-sum-exp of each query over the full causal cache.
    seen_from : int64 (n_own,)
        The first query that sees each of the last entries, in rising order; all see those before.
    mass : float32 (n_queries,)
        Written.
    """
    n_entries, n_queries = products.shape
    n_shared = n_entries - seen_from.shape[0]
    mass[:] = 0
    n_quads = n_shared // 4 * 4
    # Four entries at once keep the sums in registers; queries side by side need no sum across lanes.
    for j in range(0, n_quads, 4):
        for query in range(n_queries):
            # Subtract before scaling to base 2: the difference is small where the weight is large.
            shift = lse[query]
            early = exp(products[j, query] * scale - shift) + exp(products[j + 1, query] * scale - shift)
            late = exp(products[j + 2, query] * scale - shift) + exp(products[j + 3, query] * scale - shift)
            mass[query] += early + late
    for j in range(n_quads, n_entries):
        first = 0 if j < n_shared else seen_from[j - n_shared]
        # Slices that begin at 0 vectorise; ranges that begin at ``first`` do not.
        own, shifts, sums = products[j, first:], lse[first:], mass[first:]
        for query in range(n_queries - first):
            sums[query] += exp(own[query] * scale - shifts[query])


# A largest value vectorises only if NaN and the sign of zero may be ignored; products are finite.
@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def raise_strongest(products, first, seen_from, largest, strongest):
    """Keep each query's largest product so far and its key's position, ties to the later one.

    Parameters
    ----------
    products : float32 (n_keys, n_queries)
        Of neighbouring keys; queries in time order. Those not seen are overwritten.
    first : int
        Position of the first key.
    seen_from : int64 (n_own,)
        The first query that sees each of the last keys, in rising order; all see those before.
    largest : float32 (n_queries,)
        Updated.
    strongest : int32 (n_queries,)
        Updated.
    """
    n_keys, n_queries = products.shape
    n_own = seen_from.shape[0]
    for j in range(n_own):
        products[n_keys - n_own + j, : seen_from[j]] = -np.inf
    # Maxima of a few rows at a time vectorise, and where there is a new largest one, few rows have to be
    # looked through for it.
    n_groups = (n_keys + 7) // 8
    groups = np.empty((n_groups, n_queries), np.float32)
    for group in range(n_groups):
        first_row = min(8 * group, max(0, n_keys - 8))
        rows, best = products[first_row : first_row + 8], groups[group]
        if n_keys < 8:
            best[:] = rows[0]
            for j in range(1, n_keys):
                for query in range(n_queries):
                    best[query] = max(best[query], rows[j, query])
        else:
            for query in range(n_queries):
                early = max(max(rows[0, query], rows[1, query]), max(rows[2, query], rows[3, query]))
                late = max(max(rows[4, query], rows[5, query]), max(rows[6, query], rows[7, query]))
                best[query] = max(early, late)
    most = groups[0].copy()
    for group in range(1, n_groups):
        best = groups[group]
        for query in range(n_queries):
            most[query] = max(most[query], best[query])
    for query in range(n_queries):
        if most[query] >= largest[query]:
            largest[query] = most[query]
            group = n_groups - 1
            while groups[group, query] != most[query]:
                group -= 1
            row = min(8 * group + 7, n_keys - 1)
            while products[row, query] != most[query]:
                row -= 1
            strongest[query] = first + row


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def max_pool(values, kernel_size, pooled):
    """Write the running maximum over ``kernel_size`` neighbours, cut at both ends; float32 (n,)."""
    n = values.shape[0]
    pooled[:] = values
    for shift in range(1, min(kernel_size // 2, n - 1) + 1):
        earlier, later = values[: n - shift], values[shift:]
        from_start, to_end = pooled[: n - shift], pooled[shift:]
        for j in range(n - shift):
            from_start[j] = max(from_start[j], later[j])
        for j in range(n - shift):
            to_end[j] = max(to_end[j], earlier[j])


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def merge_logits(products, scale, n_merged, logits):
    """Write the largest of ``n_merged`` logits, less the largest of its row.

    ``products`` is float32 (n_entries, n_merged * n_queries), where columns that differ by ``n_queries``
    are merged; ``logits`` float32 (n_queries, n_entries) is written.
    """
    n_queries, n_entries = logits.shape
    for first in range(0, n_entries, _FEW_ENTRIES):
        some = products[first : first + _FEW_ENTRIES]
        for query in range(n_queries):
            merged = logits[query, first : first + _FEW_ENTRIES]
            for j in range(merged.shape[0]):
                merged[j] = some[j, query]
            for member in range(1, n_merged):
                others = some[:, member * n_queries + query :]
                for j in range(merged.shape[0]):
                    merged[j] = max(merged[j], others[j, 0])
    for query in range(n_queries):
        row = logits[query]
        largest = row[0]
        for j in range(n_entries):
            largest = max(largest, row[j])
        for j in range(n_entries):
            row[j] = row[j] * scale - largest * scale


@njit(nogil=True, cache=True, fastmath=VECTORISE)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def increases(numbers):
    """Say whether each number is larger than the one before."""
    rises = True
    for i in range(1, numbers.shape[0]):
        rises &= numbers[i] > numbers[i - 1]
    return rises


@njit(nogil=True, cache=True)
def close_up(rows, slots):
    """Move the rows at ``slots``, which increase, to the front; updated in place."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot != i:
            for d in range(rows.shape[1]):
                rows[i, d] = rows[slot, d]
