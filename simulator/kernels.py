"""Every compiled loop: arrays and scalars in, arrays out. Nothing here knows of policies or traces."""

from __future__ import annotations

import numpy as np
from numba import njit

# Sums may be reassociated so that they vectorise. NaN and infinity keep their meaning, and one machine
# always adds in the same order, so two runs are equal bit for bit.
VECTORISE = {"reassoc", "contract"}

_LOG2E = np.float32(1.4426950408889634)
# Taylor coefficients of 2**z; |z| <= 1/2 leaves a relative error below 2e-7.
_C1 = np.float32(0.6931471805599453)
_C2 = np.float32(0.2402265069591007)
_C3 = np.float32(0.05550410866482158)
_C4 = np.float32(0.009618129107628477)
_C5 = np.float32(0.0013333558146428443)
_C6 = np.float32(0.00015403530393381608)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_LOWEST = np.float32(-126.0)


@njit(inline="always")
def exp(x):
    """Give e**x in float32, for x up to 88; below -87 the smallest normal number."""
    # np.exp does not vectorise here; a polynomial on the fractional power of two does, 20 times faster.
    y = max(x * _LOG2E, _LOWEST)
    whole = np.floor(y + _HALF)
    z = y - whole
    p = _C6 * z + _C5
    p = p * z + _C4
    p = p * z + _C3
    p = p * z + _C2
    p = p * z + _C1
    p = p * z + _ONE
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)


@njit(nogil=True, cache=True, fastmath=VECTORISE)
def add_attention_mass(products, scale, lse, n_visible, mass):
    """Write each query's full-cache attention mass on the entries it can see.

    Parameters
    ----------
    products : float32 (n_rows, n_entries)
        Query-key dot products, unscaled.
    scale : float32
    lse : float32 (n_rows,)
        Log-sum-exp of each query over the full causal cache.
    n_visible : int64 (n_rows,)
        Row r sees the first ``n_visible[r]`` entries; later ones lie in its future.
    mass : float32 (n_rows,)
        Written.
    """
    for row in range(products.shape[0]):
        total = np.float32(0.0)
        shift = lse[row]
        for j in range(n_visible[row]):
            # Subtract before scaling to base 2: the difference is small where the weight is large.
            total += exp(products[row, j] * scale - shift)
        mass[row] = total


# A largest value vectorises only if NaN and the sign of zero may be ignored; products are finite.
@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def strongest_positions(products, n_visible, positions):
    """Write the column of each row's largest product, ties to the later one.

    ``products`` is float32 (n_rows, n_columns), of which row r sees ``n_visible[r]``; ``positions`` int32
    (n_rows,) is written.
    """
    for row in range(products.shape[0]):
        best = products[row, 0]
        for j in range(n_visible[row]):
            best = max(best, products[row, j])
        where = n_visible[row] - 1
        while products[row, where] != best:
            where -= 1
        positions[row] = where


@njit(nogil=True, cache=True)
def max_pool(values, kernel_size, pooled):
    """Write the running maximum over ``kernel_size`` neighbours, cut at both ends; float32 (n,)."""
    half = kernel_size // 2
    n = values.shape[0]
    for j in range(n):
        best = values[j]
        for i in range(max(0, j - half), min(n, j + half + 1)):
            if values[i] > best:
                best = values[i]
        pooled[j] = best


@njit(nogil=True, cache=True)
def add_similarity(similarity, first, threshold, first_on_no_match, sums):
    """Add up each key's similarity to a block of keys, sparing the newest duplicate of every block key.

    A row removes its contribution to the last column whose similarity exceeds ``threshold``. A row without
    one removes nothing, or, with ``first_on_no_match``, its contribution to column 0 (as the published
    R-KV code does).

    Parameters
    ----------
    similarity : float32 (n_rows, n)
        Cosine similarities of keys ``first`` onwards to all keys; a key's own is ignored.
    first : int
    threshold : float
    first_on_no_match : bool
    sums : float64 (n,)
        Updated in place.
    """
    n_rows, n = similarity.shape
    for i in range(n_rows):
        own = first + i
        last = -1
        for j in range(n - 1, -1, -1):
            if j != own and similarity[i, j] > threshold:
                last = j
                break
        if last < 0 and first_on_no_match:
            last = 0
        for j in range(n):
            if j != own and j != last:
                sums[j] += similarity[i, j]
