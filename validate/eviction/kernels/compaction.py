"""Moving survivors: within one block of memory in place, and into it from another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of each slot one program moves 32 bytes, the least that memory is read or written in: a single sequence's
# keys and values are then moved by 16 programs if a slot has 256 bytes.
_SLICE_WORDS = 8
# Entries moved together; they wait in registers, 32 for each of 128 threads.
_CHUNK = 512
_FILL_BLOCK = 64


def compact(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    survivors: torch.Tensor,
    starts: torch.Tensor,
    kept: torch.Tensor,
    new_starts: torch.Tensor,
    *,
    n_kv_heads: int,
) -> None:
    """Move each row's surviving entries to where its segments are to begin, in place.

    Parameters
    ----------
    keys, values : Tensor, shape (capacity, head_dim)
        Written.
    positions : int32 (capacity,)
        Written.
    survivors : int32 (capacity,)
        From ``starts`` on, the slots that survive, relative to ``starts``, in rising order.
    starts : int64 (n_segments,)
        Rise within a row, which is ``n_kv_heads`` neighbouring segments; rows have nothing in common.
    kept : int32 (n_segments,)
        How many survive; from ``new_starts`` on there is room for so many.
    new_starts : int64 (n_segments,)
        Rise likewise.
    n_kv_heads : int
    """
    # Whatever the numbers are, they are moved as words of 4 bytes.
    key_words, value_words = keys.view(torch.int32), values.view(torch.int32)
    n_words = key_words.shape[1]
    slice_words = min(_SLICE_WORDS, n_words)
    n_slices = n_words // slice_words
    _compact[(len(starts) // n_kv_heads, 2 * n_slices + 1)](
        key_words,
        value_words,
        positions,
        survivors,
        starts,
        kept,
        new_starts,
        N_KV_HEADS=n_kv_heads,
        WORDS=n_words,
        SLICE=slice_words,
        N_SLICES=n_slices,
        CHUNK=_CHUNK,
        # Every step waits for the slowest warp twice; few warps with many accesses each wait least.
        num_warps=4,
        # A load must not be moved ahead of the stores before it.
        num_stages=1,
    )


def fill(
    source_keys: torch.Tensor,
    source_values: torch.Tensor,
    source_starts: torch.Tensor,
    survivors: torch.Tensor | None,
    survivor_starts: torch.Tensor,
    kept: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    *,
    longest: int,
) -> None:
    """Copy each segment's surviving entries from another block, a prompt's, where slots are positions.

    Parameters
    ----------
    source_keys, source_values : Tensor, shape (n, head_dim)
    source_starts : int64 (n_segments,)
    survivors : int32 (n_survivors,), optional
        From ``survivor_starts`` on, the slots to copy, relative to ``source_starts``; all where None.
    survivor_starts : int64 (n_segments,)
    kept : int32 (n_segments,)
        How many to copy.
    keys, values : Tensor, shape (capacity, head_dim)
        Written.
    positions : int32 (capacity,)
        Written: the relative slots.
    starts : int64 (n_segments,)
        Where each segment is to begin.
    longest : int
        At least the largest of ``kept``.
    """
    n_blocks = max(1, triton.cdiv(longest, _FILL_BLOCK))
    _fill[(len(starts), n_blocks)](
        source_keys,
        source_values,
        source_starts,
        starts if survivors is None else survivors,
        survivor_starts,
        kept,
        keys,
        values,
        positions,
        starts,
        HAS_SURVIVORS=survivors is not None,
        HEAD_DIM=keys.shape[1],
        BLOCK=_FILL_BLOCK,
        num_warps=4,
    )


@triton.jit
def _compact(
    keys,
    values,
    positions,
    survivors,
    starts,
    kept,
    new_starts,
    N_KV_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    SLICE: tl.constexpr,
    N_SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # No two programs write the same memory: each has its row, and its columns of it.
    segment = tl.program_id(0) * N_KV_HEADS
    starts += segment
    kept += segment
    new_starts += segment
    part = tl.program_id(1)
    if part < N_SLICES:
        own = keys + part * SLICE
        _move(own, survivors, starts, kept, new_starts, N_KV_HEADS, WORDS, SLICE, CHUNK)
    elif part < 2 * N_SLICES:
        own = values + (part - N_SLICES) * SLICE
        _move(own, survivors, starts, kept, new_starts, N_KV_HEADS, WORDS, SLICE, CHUNK)
    else:
        _move(positions, survivors, starts, kept, new_starts, N_KV_HEADS, 1, 1, CHUNK)


@triton.jit
def _move(
    slots,
    survivors,
    starts,
    kept,
    new_starts,
    N_KV_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Over a row the new slot f(x) rises with the old slot x. First those with f(x) > x, from the last on: if
    # what stood at y = f(x) survives, then f(y) > f(x) = y, so it moves right as well, and being later it is
    # gone. Then those with f(x) < x, from the first on: if what stood at y = f(x) survives, then f(y) < y, so
    # it moves left as well, and being earlier it is gone. Nothing else comes to y, since f is one to one.
    head = N_KV_HEADS - 1
    while head >= 0:
        first = (tl.load(kept + head) + CHUNK - 1) // CHUNK * CHUNK - CHUNK
        while first >= 0:
            _move_chunk(slots, survivors, starts, kept, new_starts, head, first, True, WORDS, SLICE, CHUNK)
            first -= CHUNK
        head -= 1
    head = 0
    while head < N_KV_HEADS:
        first = 0
        while first < tl.load(kept + head):
            _move_chunk(slots, survivors, starts, kept, new_starts, head, first, False, WORDS, SLICE, CHUNK)
            first += CHUNK
        head += 1


@triton.jit
def _move_chunk(
    slots,
    survivors,
    starts,
    kept,
    new_starts,
    head,
    first,
    TO_THE_RIGHT: tl.constexpr,
    WORDS: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    start = tl.load(starts + head)
    entries = first + tl.arange(0, CHUNK)
    survives = entries < tl.load(kept + head)
    old = start + tl.load(survivors + start + entries, mask=survives, other=0)
    new = tl.load(new_starts + head) + entries
    moves = survives & ((new > old) if TO_THE_RIGHT else (new < old))
    width = tl.arange(0, SLICE)
    words = tl.load(slots + old[:, None] * WORDS + width[None, :], mask=moves[:, None])
    # All threads have loaded before any stores, and have stored before the next chunk is loaded.
    tl.debug_barrier()
    tl.store(slots + new[:, None] * WORDS + width[None, :], words, mask=moves[:, None])
    tl.debug_barrier()


@triton.jit
def _fill(
    source_keys,
    source_values,
    source_starts,
    survivors,
    survivor_starts,
    kept,
    keys,
    values,
    positions,
    starts,
    HAS_SURVIVORS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    survives = entries < tl.load(kept + segment)
    relative = entries
    if HAS_SURVIVORS:
        first = tl.load(survivor_starts + segment)
        relative = tl.load(survivors + first + entries, mask=survives, other=0)
    target = tl.load(starts + segment) + entries
    source = tl.load(source_starts + segment) + relative
    width = tl.arange(0, HEAD_DIM)
    read = source[:, None] * HEAD_DIM + width[None, :]
    written = target[:, None] * HEAD_DIM + width[None, :]
    key = tl.load(source_keys + read, mask=survives[:, None])
    value = tl.load(source_values + read, mask=survives[:, None])
    tl.store(keys + written, key, mask=survives[:, None])
    tl.store(values + written, value, mask=survives[:, None])
    tl.store(positions + target, relative, mask=survives)
