"""Scores of SnapKV and R-KV from importance and redundancy, over ragged segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from simulator.policies.parts import refuse_unless
from validate.eviction.kernels.importance import part_of

_BLOCK = 512


def combine_scores(
    importance: torch.Tensor,
    redundancy: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
    *,
    alpha: float,
    kernel_size: int,
    window: int,
    longest: int,
) -> None:
    """Write scores: pooled importance, or ``alpha`` times that less ``1 - alpha`` times redundancy.

    Importance is pooled by its maximum over ``kernel_size`` neighbouring candidates, cut at both ends. A
    segment's last ``window`` entries are no candidates: their scores are plus infinity.

    Parameters
    ----------
    importance : float32 (capacity,)
        Read at the candidates' slots.
    redundancy : float32 (capacity,), optional
        Read at the candidates' slots; without it ``alpha`` does not count.
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
    scores : float32 (capacity,)
        Written at the slots held.
    alpha : float
    kernel_size : int
        Odd.
    window : int
    longest : int
        At least the largest of ``lengths``.

    Raises
    ------
    ValueError
        If ``kernel_size`` is not an odd number.

    References
    ----------
    Cai et al. 2025, R-KV (arXiv 2505.24133); Li et al. 2024, SnapKV (arXiv 2404.14469).
    """
    is_odd = kernel_size >= 1 and kernel_size % 2 == 1
    refuse_unless(is_odd, "kernel_size", kernel_size, "an odd number")
    n_segments = len(starts)
    if n_segments == 0 or longest <= 0:
        return
    n_blocks = triton.cdiv(longest, _BLOCK)
    _combine[(n_segments * n_blocks,)](
        *(importance, redundancy, starts, lengths, scores),
        *(float(alpha), float(1 - alpha), window, n_blocks),
        REACH=kernel_size // 2,
        BLOCK=_BLOCK,
        num_warps=4,
        # Rounds as NumPy does, product by product, so that equal scores stay equal.
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["window", "n_blocks"])
def _combine(
    importance,
    redundancy,
    starts,
    lengths,
    scores,
    alpha,
    rest,
    window,
    n_blocks,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the scores of a block of entries."""
    segment, first, length = part_of(lengths, n_blocks, BLOCK)
    if first >= length:
        return
    start = tl.load(starts + segment)
    entries = first + tl.arange(0, BLOCK)
    n_candidates = length - window
    score = tl.full((BLOCK,), float("-inf"), tl.float32)
    for shift in tl.static_range(2 * REACH + 1):
        near = entries + (shift - REACH)
        exists = (near >= 0) & (near < n_candidates)
        score = tl.maximum(score, tl.load(importance + start + near, mask=exists, other=float("-inf")))
    is_candidate = entries < n_candidates
    score = tl.where(is_candidate, score, 0.0)
    if redundancy is not None:
        repeated = tl.load(redundancy + start + entries, mask=is_candidate, other=0.0)
        score = score * alpha - repeated * rest
    score = tl.where(is_candidate, score, float("inf"))
    tl.store(scores + start + entries, score, mask=entries < length)
