"""How much the last queries attend to each entry, over ragged segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from simulator.policies.parts import refuse_unless

# More parts of a segment than these would cost the second pass more to read than the keys do.
_MOST_SPLITS = 128
HEAD_DIMS = (16, 32, 64, 128, 256)


def window_importance(
    queries: torch.Tensor,
    keys: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    importance: torch.Tensor,
    *,
    scale: float,
    window: int,
    longest: int,
) -> None:
    """Write the window's mean attention to each candidate: SnapKV's importance before it is pooled.

    A segment's last ``window`` entries are no candidates: they are left out of the softmax, and their slots
    are not written. A segment of at most ``window`` entries writes nothing. Of a GQA group, each query
    position takes the largest logit.

    Parameters
    ----------
    queries : (n_segments, group_size, n_queries, head_dim), contiguous, of the keys' type
        The last queries of the KV head's group.
    keys : (capacity, head_dim), contiguous
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
    importance : float32 (capacity,)
        Written at the candidates' slots; each segment's sum to 1.
    scale : float
        Attention scale.
    window : int
    longest : int
        At least the largest of ``lengths``.

    Raises
    ------
    ValueError
        If ``head_dim`` is not one of ``HEAD_DIMS``, or queries and keys differ in type.

    References
    ----------
    Li et al. 2024, SnapKV (arXiv 2404.14469); the decode-time form of R-KV (arXiv 2505.24133).
    """
    n_segments, group_size, n_queries, _ = queries.shape
    sizes = tile_sizes(keys)
    refuse_unless(queries.dtype == keys.dtype, "the queries' type", queries.dtype, f"{keys.dtype}, as keys")
    n_candidates = longest - window
    if n_segments == 0 or n_candidates <= 0:
        return
    split = sizes["BLOCK"] * triton.cdiv(n_candidates, sizes["BLOCK"] * _MOST_SPLITS)
    n_splits = triton.cdiv(n_candidates, split)
    maxima = torch.empty((n_segments, n_splits, n_queries), dtype=torch.float32, device=keys.device)
    sums = torch.empty_like(maxima)
    given = (queries, keys, starts, lengths, maxima, sums)
    numbers = (float(scale), window, split, n_splits)
    block_queries = max(16, triton.next_power_of_2(n_queries))
    sizes |= {"N_QUERIES": n_queries, "GROUP_SIZE": group_size, "BLOCK_QUERIES": block_queries}
    sizes["num_warps"] = 4 if block_queries < 64 else 8
    grid = (n_segments * n_splits,)
    _sum_exponentials[grid](*given, *numbers, **sizes)
    _write_means[grid](*given, importance, *numbers, **sizes)


def tile_sizes(keys: torch.Tensor) -> dict[str, int]:
    """Give the sizes of tiles that fit the registers; a ValueError for a width of keys that has none."""
    head_dim = keys.shape[1]
    refuse_unless(head_dim in HEAD_DIMS, "head_dim", head_dim, ", ".join(map(str, HEAD_DIMS)))
    # Without tensor cores, operands of all dimensions at once do not fit the registers.
    is_exact = keys.dtype == torch.float32
    return {
        "HEAD_DIM": head_dim,
        "BLOCK": 64 if is_exact else 128,
        "CHUNK": 16 if is_exact else head_dim,
        # Interpreted kernels would multiply the bits of bfloat16, whose products are exact in float32.
        "WIDEN": keys.dtype == torch.bfloat16 and keys.device.type == "cpu",
    }


@triton.jit
def part_of(lengths, n_parts, part_size):
    """Give a program's segment, the first entry of its part of it, and the segment's length."""
    program = tl.program_id(0)
    segment = program // n_parts
    return segment, (program % n_parts) * part_size, tl.load(lengths + segment)


@triton.jit
def _merged_logits(
    queries,
    keys,
    segment,
    start,
    entries,
    n_candidates,
    scale,
    N_QUERIES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Give the group's largest logits, (len(entries), BLOCK_QUERIES); minus infinity past the candidates."""
    held = entries < n_candidates
    columns = tl.arange(0, BLOCK_QUERIES)
    known = columns < N_QUERIES
    slots = start + entries
    own = queries + segment.to(tl.int64) * (GROUP_SIZE * N_QUERIES * HEAD_DIM)
    merged = tl.full((entries.shape[0], BLOCK_QUERIES), float("-inf"), tl.float32)
    for member in tl.static_range(GROUP_SIZE):
        rows = own + member * (N_QUERIES * HEAD_DIM)
        logits = tl.zeros((entries.shape[0], BLOCK_QUERIES), tl.float32)
        for first in range(0, HEAD_DIM, CHUNK):
            dims = first + tl.arange(0, CHUNK)
            at = slots[:, None] * HEAD_DIM + dims[None, :]
            tile = tl.load(keys + at, mask=held[:, None], other=0.0)
            at = columns[:, None] * HEAD_DIM + dims[None, :]
            asked = tl.load(rows + at, mask=known[:, None], other=0.0)
            if WIDEN:
                tile = tile.to(tl.float32)
                asked = asked.to(tl.float32)
            logits = tl.dot(tile, tl.trans(asked), logits, input_precision="ieee")
        merged = tl.maximum(merged, logits)
    return tl.where(held[:, None], merged * scale, float("-inf"))


@triton.jit(do_not_specialize=["window", "split", "n_splits"])
def _sum_exponentials(
    queries,
    keys,
    starts,
    lengths,
    maxima,
    sums,
    scale,
    window,
    split,
    n_splits,
    N_QUERIES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Write each query's largest logit in one part of a segment, and its sum of exponentials above that."""
    segment, first, length = part_of(lengths, n_splits, split)
    n_candidates = length - window
    if first >= n_candidates:
        return
    start = tl.load(starts + segment)
    stop = tl.minimum(first + split, n_candidates)
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    while first < stop:
        entries = first + tl.arange(0, BLOCK)
        logits = _merged_logits(
            queries,
            keys,
            segment,
            start,
            entries,
            n_candidates,
            scale,
            N_QUERIES,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_QUERIES,
            CHUNK,
            WIDEN,
        )
        raised = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - raised) + tl.sum(tl.exp(logits - raised[None, :]), axis=0)
        largest = raised
        first += BLOCK
    columns = tl.arange(0, BLOCK_QUERIES)
    at = tl.program_id(0).to(tl.int64) * N_QUERIES + columns
    tl.store(maxima + at, largest, mask=columns < N_QUERIES)
    tl.store(sums + at, total, mask=columns < N_QUERIES)


@triton.jit(do_not_specialize=["window", "split", "n_splits"])
def _write_means(
    queries,
    keys,
    starts,
    lengths,
    maxima,
    sums,
    importance,
    scale,
    window,
    split,
    n_splits,
    N_QUERIES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Write the mean weights of one part of a segment, normalised by what all its parts summed up."""
    segment, first, length = part_of(lengths, n_splits, split)
    n_candidates = length - window
    if first >= n_candidates:
        return
    start = tl.load(starts + segment)
    columns = tl.arange(0, BLOCK_QUERIES)
    known = columns < N_QUERIES
    n_parts = tl.cdiv(n_candidates, split)
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    part = n_parts * 0
    while part < n_parts:
        parts = part + tl.arange(0, 16)
        at = (segment.to(tl.int64) * n_splits + parts[:, None]) * N_QUERIES + columns[None, :]
        written = (parts[:, None] < n_parts) & known[None, :]
        tops = tl.load(maxima + at, mask=written, other=float("-inf"))
        # A column that stands for no query gets any finite maximum: infinities have no difference.
        tops = tl.where(known[None, :], tops, 0.0)
        raised = tl.maximum(largest, tl.max(tops, axis=0))
        shares = tl.load(sums + at, mask=written, other=0.0) * tl.exp(tops - raised[None, :])
        total = total * tl.exp(largest - raised) + tl.sum(shares, axis=0)
        largest = raised
        part += 16
    total = tl.where(known, total, 1.0)
    stop = tl.minimum(first + split, n_candidates)
    while first < stop:
        entries = first + tl.arange(0, BLOCK)
        logits = _merged_logits(
            queries,
            keys,
            segment,
            start,
            entries,
            n_candidates,
            scale,
            N_QUERIES,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_QUERIES,
            CHUNK,
            WIDEN,
        )
        weights = tl.exp(logits - largest[None, :]) / total[None, :]
        means = tl.sum(tl.where(known[None, :], weights, 0.0), axis=1) / N_QUERIES
        tl.store(importance + start + entries, means, mask=entries < n_candidates)
        first += BLOCK
