"""Attention of one decode step over ragged segments, long ones divided over several programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634
# Bytes of one tile of keys, and of values. Three stages keep two of each on their way, in 64 KiB of shared
# memory: three programs fit on a multiprocessor, and what they have in flight outlasts the latency of HBM.
_TILE_BYTES = 2**14
# Tiles that one program should read at least, or filling its pipeline takes as long as the rest.
_FEWEST_TILES = 4
# Entries that one program should read at most, or a long segment is still busy when all others are done.
_MOST_ENTRIES = 4096
# Five times what the 132 multiprocessors of an H100 hold at once: what is left over at the end is small.
_WANTED_PROGRAMS = 2048
_BLOCK_SPLITS = 16

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    longest: int,
) -> None:
    """Attend from one token per sequence to the entries its KV heads hold; a head without any gives zeros.

    Parameters
    ----------
    queries : Tensor, shape (n_rows, n_query_heads, head_dim), contiguous
    keys, values : Tensor, shape (capacity, head_dim), dtype of ``queries``
        A number of entries per segment from ``starts`` on; what stands elsewhere may be anything.
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
        Segments are the KV heads of one row after the other.
    output : Tensor, shape (n_rows, n_query_heads, head_dim), contiguous
        Written.
    scale : float
    longest : int
        About the largest of ``lengths``, by which the work is divided; the result is right whatever it is.

    References
    ----------
    Flash-Decoding (Dao, Haziza, Massa, Sizov 2023): a segment's entries are divided over programs, whose
    results are merged by their log-sum-exp.
    """
    n_segments, head_dim = len(starts), keys.shape[1]
    partials, lse = attention_scratch(queries, n_segments, longest)
    n_splits = lse.shape[1]
    group_size = queries.shape[0] * queries.shape[1] // n_segments
    block = _block_entries(keys)
    _attend_split[(n_segments, n_splits)](
        queries,
        keys,
        values,
        starts,
        lengths,
        # One split's result is the whole, in the same layout.
        output if n_splits == 1 else partials,
        lse,
        scale * _LOG2E,
        n_splits,
        GROUP=group_size,
        # Tensor cores take 16 rows of queries at least; float32 is computed without them.
        GROUP_BLOCK=triton.next_power_of_2(group_size) if keys.dtype == torch.float32 else 16,
        HEAD_DIM=head_dim,
        BLOCK=block,
        FEWEST=_FEWEST_TILES,
        num_warps=4,
        num_stages=3,
    )
    if n_splits > 1:
        _merge_splits[(n_segments * group_size,)](
            partials,
            lse,
            output,
            n_splits,
            GROUP=group_size,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=min(_BLOCK_SPLITS, triton.next_power_of_2(n_splits)),
            num_warps=4,
        )


def attention_scratch(
    queries: torch.Tensor, n_segments: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what ``attend`` writes between its two launches, for segments up to ``longest``.

    Returns
    -------
    float32 (n_segments, n_splits, group_size, head_dim) and (n_segments, n_splits, group_size)
        Each split's result and the log-sum-exp of its logits, to base 2.
    """
    n_rows, n_query_heads, head_dim = queries.shape
    group_size = n_rows * n_query_heads // n_segments
    n_splits = _count_splits(n_segments, longest, _FEWEST_TILES * _block_entries(queries))
    lse = torch.empty(n_segments, n_splits, group_size, dtype=torch.float32, device=queries.device)
    size = (n_segments, n_splits, group_size, head_dim) if n_splits > 1 else (0,)
    return torch.empty(size, dtype=torch.float32, device=queries.device), lse


def _count_splits(n_segments: int, longest: int, fewest: int) -> int:
    wanted = max(triton.cdiv(_WANTED_PROGRAMS, n_segments), triton.cdiv(longest, _MOST_ENTRIES))
    return max(1, min(wanted, triton.cdiv(longest, fewest)))


def _block_entries(keys: torch.Tensor) -> int:
    return max(16, min(128, _TILE_BYTES // (keys.shape[-1] * keys.element_size())))


@triton.jit
def _loaded(number):
    return number


def _counted(number) -> int:
    count = 0
    while count < number:
        count += 1
    return count


# Only ``range`` is pipelined, and the interpreter's takes no number that was loaded or passed.
_bound = _counted if _INTERPRETED.value else _loaded


@triton.jit
def _factor(tensor):
    # The interpreter multiplies the bits of bfloat16 as if they were integers.
    return tensor.to(tl.float32) if _INTERPRETED else tensor


@triton.jit
def _rounded(weights, dtype: tl.constexpr):
    # The interpreter cuts bfloat16 off, where a GPU rounds to nearest.
    return weights if _INTERPRETED else weights.to(dtype)


@triton.jit
def _attend_split(
    queries,
    keys,
    values,
    starts,
    lengths,
    partials,
    lse,
    scale,
    n_splits,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FEWEST: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = tl.load(starts + segment)
    length = tl.load(lengths + segment)
    # Every segment is divided evenly, but not into pieces too small: its last splits may get nothing.
    n_tiles = tl.cdiv(length, BLOCK)
    share = tl.maximum(tl.cdiv(n_tiles, n_splits), FEWEST)
    first_tile = split * share
    n_own = tl.minimum(share, tl.maximum(n_tiles - first_tile, 0))

    members = tl.arange(0, GROUP_BLOCK)
    width = tl.arange(0, HEAD_DIM)
    is_member = members < GROUP
    own = (segment * GROUP + members)[:, None] * HEAD_DIM + width[None, :]
    query = tl.load(queries + own, mask=is_member[:, None], other=0.0)

    largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    mixed = tl.zeros((GROUP_BLOCK, HEAD_DIM), tl.float32)
    for tile in tl.range(0, _bound(n_own)):
        slots = (first_tile + tile) * BLOCK + tl.arange(0, BLOCK)
        is_held = slots < length
        offsets = (start + slots)[:, None] * HEAD_DIM + width[None, :]
        # Zeros for what is not held: 0 times anything that is not a number would not be 0.
        key = tl.load(keys + offsets, mask=is_held[:, None], other=0.0)
        logits = tl.dot(_factor(query), tl.trans(_factor(key)), input_precision="ieee") * scale
        logits = tl.where(is_held[None, :], logits, float("-inf"))
        # A program's tiles all hold something, so the maximum is finite from the first one on.
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shrunk = tl.exp2(largest - new_largest)
        # Weights are summed as rounded, so that those of all entries add up to one.
        weights = _rounded(tl.exp2(logits - new_largest[:, None]), values.dtype.element_ty)
        total = total * shrunk + tl.sum(weights.to(tl.float32), 1)
        value = tl.load(values + offsets, mask=is_held[:, None], other=0.0)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(weights, _factor(value), mixed, input_precision="ieee")
        largest = new_largest

    # A split without entries writes zeros and minus infinity, by which it is left out.
    total = tl.where(total > 0, total, 1.0)
    mixed = mixed / total[:, None]
    place = (segment * n_splits + split) * GROUP + members
    tl.store(
        partials + place[:, None] * HEAD_DIM + width[None, :],
        mixed.to(partials.dtype.element_ty),
        mask=is_member[:, None],
    )
    tl.store(lse + place, largest + tl.log2(total), mask=is_member)


@triton.jit
def _merge_splits(
    partials,
    lse,
    output,
    n_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    first_place = head // GROUP * n_splits * GROUP + head % GROUP
    width = tl.arange(0, HEAD_DIM)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((HEAD_DIM,), tl.float32)
    first = 0
    while first < n_splits:
        splits = first + tl.arange(0, BLOCK_SPLITS)
        places = first_place + splits * GROUP
        shares = tl.load(lse + places, mask=splits < n_splits, other=float("-inf"))
        # The first split is empty only if all are; then nothing may be subtracted from minus infinity.
        new_largest = tl.maximum(largest, tl.max(shares, 0))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(shares - reference)
        shrunk = tl.exp2(largest - reference)
        held = tl.load(
            partials + places[:, None] * HEAD_DIM + width[None, :], mask=(weights > 0)[:, None], other=0.0
        )
        mixed = mixed * shrunk + tl.sum(weights[:, None] * held, 0)
        total = total * shrunk + tl.sum(weights, 0)
        largest = new_largest
        first += BLOCK_SPLITS
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(output + head * HEAD_DIM + width, mixed.to(output.dtype.element_ty))
