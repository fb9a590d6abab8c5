"""How much each key repeats the others of its segment, over ragged segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from validate.eviction.kernels.importance import part_of, tile_sizes

_MOST_SPLITS = 32
_BLOCK = 64


def redundancy(
    keys: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    redundancy: torch.Tensor,
    *,
    threshold: float,
    longest: int,
) -> None:
    """Write each key's share of its segment's repetition.

    That is the softmax, over all entries of the segment, of each key's mean cosine to all keys, itself left
    out, where every key spares the newest of those whose cosine to it is above the threshold.

    Parameters
    ----------
    keys : (capacity, head_dim), contiguous
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
    redundancy : float32 (capacity,)
        Written at the slots held; each segment's sum to 1.
    threshold : float
    longest : int
        At least the largest of ``lengths``.

    Raises
    ------
    ValueError
        If ``head_dim`` is not one of ``HEAD_DIMS``.

    Notes
    -----
    Only the search for duplicates compares all pairs. The sum of a key's cosines is its product with the sum
    of all unit keys, less what does not count. A pair is judged once, so that nothing hangs on two passes
    agreeing about it.

    References
    ----------
    Cai et al. 2025, R-KV (arXiv 2505.24133).
    """
    tiles = tile_sizes(keys)
    head_dim, n_segments = keys.shape[1], len(starts)
    if n_segments == 0 or longest <= 0:
        return
    split = _BLOCK * triton.cdiv(longest, _BLOCK * _MOST_SPLITS)
    n_splits = triton.cdiv(longest, split)
    n_blocks = triton.cdiv(longest, _BLOCK)
    inverse = torch.empty(len(keys), dtype=torch.float32, device=keys.device)
    similarity = torch.empty_like(inverse)
    newest = torch.empty(len(keys), dtype=torch.int32, device=keys.device)
    directions = torch.empty((n_segments, n_splits, head_dim), dtype=torch.float32, device=keys.device)
    totals = torch.empty((n_segments, n_blocks), dtype=torch.float32, device=keys.device)
    segments = (starts, lengths)
    sizes = {"HEAD_DIM": head_dim, "BLOCK": _BLOCK, "num_warps": 4}
    _sum_directions[(n_segments * n_splits,)](keys, *segments, inverse, directions, split, n_splits, **sizes)
    is_exact, n_tiles = keys.dtype == torch.float32, triton.cdiv(longest, tiles["BLOCK"])
    _find_newest[(n_segments * n_tiles,)](
        *(keys, *segments, inverse, newest, float(threshold), n_tiles),
        **tiles,
        num_warps=4 if is_exact else 8,
        # Two programs to a multiprocessor, so that one multiplies while the other waits for keys.
        maxnreg=None if is_exact else 128,
    )
    grid = (n_segments * n_blocks,)
    _compare_newest[grid](keys, *segments, inverse, newest, similarity, n_blocks, **sizes)
    found = (inverse, newest, similarity, directions)
    _write_exponentials[grid](keys, *segments, *found, redundancy, totals, split, n_splits, n_blocks, **sizes)
    _normalise[grid](*segments, redundancy, totals, n_blocks, BLOCK=_BLOCK, num_warps=2)


@triton.jit(do_not_specialize=["split", "n_splits"])
def _sum_directions(
    keys,
    starts,
    lengths,
    inverse,
    directions,
    split,
    n_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write inverse norms of one part of a segment, and the sum of its unit keys."""
    segment, first, length = part_of(lengths, n_splits, split)
    if first >= length:
        return
    start = tl.load(starts + segment)
    stop = tl.minimum(first + split, length)
    dims = tl.arange(0, HEAD_DIM)
    direction = tl.zeros((HEAD_DIM,), tl.float32)
    while first < stop:
        entries = first + tl.arange(0, BLOCK)
        slots = start + entries
        held = entries < length
        tile = tl.load(keys + slots[:, None] * HEAD_DIM + dims[None, :], mask=held[:, None], other=0.0)
        tile = tile.to(tl.float32)
        norms = tl.sqrt_rn(tl.sum(tile * tile, axis=1))
        # Added to the norm, as the published code does; it keeps a zero key finite.
        scales = tl.div_rn(1.0, norms + 1e-8)
        tl.store(inverse + slots, scales, mask=held)
        direction += tl.sum(tile * scales[:, None], axis=0)
        first += BLOCK
    tl.store(directions + tl.program_id(0).to(tl.int64) * HEAD_DIM + dims, direction)


@triton.jit
def _load_rows(keys, slots, held, dims, HEAD_DIM: tl.constexpr, WIDEN: tl.constexpr):
    """Give some dimensions of the keys at ``slots``, (len(slots), len(dims)); zero where none is held."""
    rows = tl.load(keys + slots[:, None] * HEAD_DIM + dims[None, :], mask=held[:, None], other=0.0)
    if WIDEN:
        rows = rows.to(tl.float32)
    return rows


@triton.jit(do_not_specialize=["n_tiles"])
def _find_newest(
    keys,
    starts,
    lengths,
    inverse,
    newest,
    threshold,
    n_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Write the newest duplicate of each of a block of entries, -1 for none."""
    segment, first, length = part_of(lengths, n_tiles, BLOCK)
    if first >= length:
        return
    start = tl.load(starts + segment)
    dims = tl.arange(0, CHUNK)
    entries = first + tl.arange(0, BLOCK)
    held = entries < length
    scales = tl.load(inverse + start + entries, mask=held, other=0.0)
    if CHUNK == HEAD_DIM:
        tile = _load_rows(keys, start + entries, held, dims, HEAD_DIM, WIDEN)
    found = tl.where(held, -1, 0)
    # From the newest entries back: what is found first counts, and a block that lacks none is done.
    block = (length - 1) // BLOCK * BLOCK
    while (block >= 0) & (tl.min(found, axis=0) < 0):
        others = block + tl.arange(0, BLOCK)
        known = others < length
        if CHUNK == HEAD_DIM:
            rows = _load_rows(keys, start + others, known, dims, HEAD_DIM, WIDEN)
            cosines = tl.dot(tile, tl.trans(rows), input_precision="ieee")
        else:
            cosines = tl.zeros((BLOCK, BLOCK), tl.float32)
            for dim in range(0, HEAD_DIM, CHUNK):
                own = _load_rows(keys, start + entries, held, dim + dims, HEAD_DIM, WIDEN)
                rows = _load_rows(keys, start + others, known, dim + dims, HEAD_DIM, WIDEN)
                cosines = tl.dot(own, tl.trans(rows), cosines, input_precision="ieee")
        other_scales = tl.load(inverse + start + others, mask=known, other=0.0)
        cosines = cosines * scales[:, None] * other_scales[None, :]
        counts = known[None, :] & (entries[:, None] != others[None, :])
        duplicates = tl.where((cosines > threshold) & counts, others[None, :], -1)
        found = tl.maximum(found, tl.max(duplicates, axis=1))
        block -= BLOCK
    tl.store(newest + start + entries, found, mask=held)


@triton.jit(do_not_specialize=["n_blocks"])
def _compare_newest(
    keys,
    starts,
    lengths,
    inverse,
    newest,
    similarity,
    n_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the cosine of each of a block of entries to its newest duplicate, 0 for none."""
    segment, first, length = part_of(lengths, n_blocks, BLOCK)
    if first >= length:
        return
    slots = tl.load(starts + segment) + first + tl.arange(0, BLOCK)
    held = first + tl.arange(0, BLOCK) < length
    found = tl.load(newest + slots, mask=held, other=-1)
    has = found >= 0
    twins = tl.load(starts + segment) + found
    dims = tl.arange(0, HEAD_DIM)
    rows = _load_rows(keys, slots, has, dims, HEAD_DIM, True)
    products = tl.sum(rows * _load_rows(keys, twins, has, dims, HEAD_DIM, True), axis=1)
    scales = tl.load(inverse + slots, mask=has, other=0.0)
    cosines = products * scales * tl.load(inverse + twins, mask=has, other=0.0)
    tl.store(similarity + slots, cosines, mask=held)


@triton.jit(do_not_specialize=["split", "n_splits", "n_blocks"])
def _write_exponentials(
    keys,
    starts,
    lengths,
    inverse,
    newest,
    similarity,
    directions,
    redundancy,
    totals,
    split,
    n_splits,
    n_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the exponentials of the mean cosines of a block of entries, and their sum."""
    segment, first, length = part_of(lengths, n_blocks, BLOCK)
    if first >= length:
        return
    start = tl.load(starts + segment)
    dims = tl.arange(0, HEAD_DIM)
    direction = tl.zeros((HEAD_DIM,), tl.float32)
    n_parts = tl.cdiv(length, split)
    part = n_parts * 0
    while part < n_parts:
        at = (segment.to(tl.int64) * n_splits + part) * HEAD_DIM
        direction += tl.load(directions + at + dims)
        part += 1
    entries = first + tl.arange(0, BLOCK)
    held = entries < length
    at = (start + entries)[:, None] * HEAD_DIM + dims[None, :]
    tile = tl.load(keys + at, mask=held[:, None], other=0.0).to(tl.float32)
    scales = tl.load(inverse + start + entries, mask=held, other=0.0)
    own = tl.sum(tile * tile, axis=1) * scales
    similar = (tl.sum(tile * direction[None, :], axis=1) - own) * scales
    spared = tl.zeros((BLOCK,), tl.float32)
    row = length * 0
    while row < length:
        others = row + tl.arange(0, 2 * BLOCK)
        known = others < length
        duplicates = tl.load(newest + start + others, mask=known, other=-1)
        cosines = tl.load(similarity + start + others, mask=known, other=0.0)
        meets = duplicates[:, None] == entries[None, :]
        spared += tl.sum(tl.where(meets, cosines[:, None], 0.0), axis=0)
        row += 2 * BLOCK
    # Means are cosines at most, so that their exponentials need no shift.
    weights = tl.exp((similar - spared) / length)
    tl.store(redundancy + start + entries, weights, mask=held)
    tl.store(totals + tl.program_id(0), tl.sum(tl.where(held, weights, 0.0), axis=0))


@triton.jit(do_not_specialize=["n_blocks"])
def _normalise(starts, lengths, redundancy, totals, n_blocks, BLOCK: tl.constexpr):
    """Divide a block of exponentials by the sum over their segment."""
    segment, first, length = part_of(lengths, n_blocks, BLOCK)
    if first >= length:
        return
    n_written = tl.cdiv(length, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    block = n_written * 0
    while block < n_written:
        blocks = block + tl.arange(0, BLOCK)
        own = totals + segment.to(tl.int64) * n_blocks
        sums += tl.load(own + blocks, mask=blocks < n_written, other=0.0)
        block += BLOCK
    entries = first + tl.arange(0, BLOCK)
    at = redundancy + tl.load(starts + segment) + entries
    weights = tl.load(at, mask=entries < length, other=0.0)
    tl.store(at, weights / tl.sum(sums, axis=0), mask=entries < length)
