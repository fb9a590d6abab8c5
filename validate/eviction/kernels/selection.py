"""Which entries survive, and how many of each head's win a row's contest: thresholds without sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Entries looked at together: 16 for each thread at most, all loads on their way at once.
_MOST_ENTRIES = 4096


def select(
    scores: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    quotas: torch.Tensor,
    survivors: torch.Tensor,
    kept: torch.Tensor,
    *,
    longest: int,
) -> None:
    """Choose each segment's best entries; ties go to the later slot.

    This is ``engine.selection.select_slots`` in chronological order, for segments that are by position.

    Parameters
    ----------
    scores : float32 (capacity,)
        Protected entries are plus infinity; none is NaN.
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
    quotas : int32 (n_segments,)
        Entries to keep at most; where there are no more, all survive.
    survivors : int32 (capacity,)
        Written: from ``starts`` on, the slots that survive, relative to ``starts``, in rising order.
    kept : int32 (n_segments,)
        Written: how many survive.
    longest : int
        About the largest of ``lengths``, by which the work is divided.

    References
    ----------
    R-KV (arXiv 2505.24133) keeps the best scores of each KV head; the threshold is found bit by bit, as a
    radix sort would.
    """
    block = _block_entries(longest)
    _select[(len(starts),)](
        scores, starts, lengths, quotas, survivors, kept, BLOCK=block, num_warps=_count_warps(block)
    )


def demand(
    scores: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    totals: torch.Tensor,
    counts: torch.Tensor,
    *,
    n_kv_heads: int,
    longest: int,
) -> None:
    """Count how many of each KV head's entries reach the K-th largest score of its row, K the row's budget.

    Parameters
    ----------
    scores : float32 (capacity,)
        Protected entries are plus infinity; none is NaN.
    starts : int64 (n_segments,)
        A row is ``n_kv_heads`` neighbouring segments.
    lengths : int32 (n_segments,)
    totals : int32 (n_rows,)
        Where a row holds no more, every entry counts.
    counts : int32 (n_segments,)
        Written.
    n_kv_heads : int
    longest : int
        About the largest of ``lengths``, by which the work is divided.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), level II: the demand of a head, before it is smoothed and bounded.
    """
    heads_block = triton.next_power_of_2(n_kv_heads)
    block = max(32, _block_entries(longest) // heads_block)
    _demand[(len(totals),)](
        scores,
        starts,
        lengths,
        totals,
        counts,
        N_KV_HEADS=n_kv_heads,
        HEADS_BLOCK=heads_block,
        BLOCK=block,
        num_warps=_count_warps(block * heads_block),
    )


def _block_entries(longest: int) -> int:
    return max(128, min(_MOST_ENTRIES, triton.next_power_of_2(longest)))


def _count_warps(block: int) -> int:
    return 8 if block > 1024 else 4


@triton.jit
def _image(scores):
    """Give unsigned integers in the order of the scores."""
    # Zeros are equal, whatever their sign, but their bits are not.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _count_reaching(scores, start, length, threshold, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    first = 0
    while first < length:
        slots = first + tl.arange(0, BLOCK)
        is_held = slots < length
        images = _image(tl.load(scores + start + slots, mask=is_held, other=0.0))
        found += (is_held & (images >= threshold)).to(tl.int32)
        first += BLOCK
    return tl.sum(found, 0)


@triton.jit
def _select(scores, starts, lengths, quotas, survivors, kept, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start = tl.load(starts + segment)
    length = tl.load(lengths + segment)
    n_kept = tl.minimum(length, tl.load(quotas + segment).to(tl.int32))

    # The largest threshold that enough entries reach, from its highest bit down. Nothing has the image 0,
    # nor that with all bits set: where all survive nothing is searched, and where none does nothing reaches.
    threshold = tl.zeros((), tl.uint32)
    bit = tl.where(n_kept < length, 31, -1)
    while bit >= 0:
        raised = threshold | (tl.full((), 1, tl.uint32) << bit.to(tl.uint32))
        is_reached = _count_reaching(scores, start, length, raised, BLOCK) >= n_kept
        threshold = tl.where(is_reached, raised, threshold)
        bit -= 1

    # Too many reach it only if several are equal to it; of those the first have to go.
    n_surplus = _count_reaching(scores, start, length, threshold, BLOCK) - n_kept
    n_ties = 0
    n_placed = 0
    first = 0
    while first < length:
        slots = first + tl.arange(0, BLOCK)
        is_held = slots < length
        images = _image(tl.load(scores + start + slots, mask=is_held, other=0.0))
        is_tie = (is_held & (images == threshold)).to(tl.int32)
        tie_number = n_ties + tl.cumsum(is_tie, 0)
        survives = is_held & ((images > threshold) | ((is_tie > 0) & (tie_number > n_surplus)))
        places = n_placed + tl.cumsum(survives.to(tl.int32), 0) - 1
        tl.store(survivors + start + places, slots, mask=survives)
        n_ties += tl.sum(is_tie, 0)
        n_placed += tl.sum(survives.to(tl.int32), 0)
        first += BLOCK
    tl.store(kept + segment, n_kept)


@triton.jit
def _count_row(scores, start, length, longest, threshold, HEADS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    found = tl.zeros((HEADS_BLOCK, BLOCK), tl.int32)
    first = 0
    while first < longest:
        slots = first + tl.arange(0, BLOCK)
        is_held = slots[None, :] < length[:, None]
        offsets = start[:, None] + slots[None, :]
        images = _image(tl.load(scores + offsets, mask=is_held, other=0.0))
        found += (is_held & (images >= threshold)).to(tl.int32)
        first += BLOCK
    return tl.sum(found, 1)


@triton.jit
def _demand(
    scores,
    starts,
    lengths,
    totals,
    counts,
    N_KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    heads = tl.arange(0, HEADS_BLOCK)
    segments = row * N_KV_HEADS + heads
    is_head = heads < N_KV_HEADS
    start = tl.load(starts + segments, mask=is_head, other=0)
    length = tl.load(lengths + segments, mask=is_head, other=0)
    longest = tl.max(length, 0)
    total = tl.load(totals + row).to(tl.int32)

    # As in ``_select``; all heads at once, since a row alone has to keep many threads busy.
    threshold = tl.zeros((), tl.uint32)
    bit = tl.where(total < tl.sum(length, 0), 31, -1)
    while bit >= 0:
        raised = threshold | (tl.full((), 1, tl.uint32) << bit.to(tl.uint32))
        found = _count_row(scores, start, length, longest, raised, HEADS_BLOCK, BLOCK)
        threshold = tl.where(tl.sum(found, 0) >= total, raised, threshold)
        bit -= 1
    found = _count_row(scores, start, length, longest, threshold, HEADS_BLOCK, BLOCK)
    tl.store(counts + segments, found, mask=is_head)
