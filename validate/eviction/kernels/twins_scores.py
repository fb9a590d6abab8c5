"""The kernels that score entries, in plain torch: what a CPU runs and what the kernels are tested against.

Segments are laid side by side, padded to the longest, a few at a time; the host never learns a length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from simulator.policies.parts import refuse_unless

# Numbers that one block may hold.
_MOST_NUMBERS = 2**24


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
    queries : (n_segments, group_size, n_queries, head_dim), of the keys' type
        The last queries of the KV head's group.
    keys : (capacity, head_dim)
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
        If queries and keys differ in type.

    References
    ----------
    Li et al. 2024, SnapKV (arXiv 2404.14469); the decode-time form of R-KV (arXiv 2505.24133).
    """
    refuse_unless(queries.dtype == keys.dtype, "the queries' type", queries.dtype, f"{keys.dtype}, as keys")
    n_columns = queries.shape[1] * queries.shape[2]
    for some in _chunks(starts, longest, max(n_columns, keys.shape[1])):
        slots, held = _slots(starts[some], lengths[some], longest)
        is_candidate = _slots(starts[some], lengths[some] - window, longest)[1]
        tiles = _tiles(keys, slots, held)
        logits = (queries[some].float() @ tiles.mT[:, None]).amax(1) * scale
        weights = logits.masked_fill(~is_candidate[:, None], float("-inf")).softmax(2)
        _write(importance, slots, is_candidate, weights.mean(1))


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
    keys : (capacity, head_dim)
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
    redundancy : float32 (capacity,)
        Written at the slots held; each segment's sum to 1.
    threshold : float
    longest : int
        At least the largest of ``lengths``.

    References
    ----------
    Cai et al. 2025, R-KV (arXiv 2505.24133).
    """
    for some in _chunks(starts, longest, max(longest, keys.shape[1])):
        slots, held = _slots(starts[some], lengths[some], longest)
        sums = _sum_cosines(_tiles(keys, slots, held), held, threshold)
        means = sums / lengths[some, None].clamp(min=1)
        _write(redundancy, slots, held, means.masked_fill(~held, float("-inf")).softmax(1))


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
    for some in _chunks(starts, longest, 1):
        slots, held = _slots(starts[some], lengths[some], longest)
        is_candidate = _slots(starts[some], lengths[some] - window, longest)[1]
        attended = importance[slots].masked_fill(~is_candidate, float("-inf"))
        pooled = functional.max_pool1d(attended[:, None], kernel_size, 1, kernel_size // 2)[:, 0]
        if redundancy is not None:
            pooled = pooled * alpha - redundancy[slots] * (1 - alpha)
        _write(scores, slots, held, pooled.masked_fill(~is_candidate, float("inf")))


def _chunks(starts: torch.Tensor, longest: int, width: int) -> Iterator[slice]:
    """Give slices of segments, so many that (n, longest, width) fits a block."""
    if longest > 0:
        size = max(1, _MOST_NUMBERS // (longest * width))
        for first in range(0, len(starts), size):
            yield slice(first, first + size)


def _slots(starts: torch.Tensor, lengths: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each entry's slot, int64 (n_segments, longest), 0 for none, and whether there is one."""
    entries = torch.arange(longest, device=starts.device)
    held = entries < lengths[:, None]
    return torch.where(held, starts[:, None] + entries, 0), held


def _tiles(keys: torch.Tensor, slots: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Give the keys at ``slots``, float32 (n_segments, longest, head_dim), zero where none is held."""
    return keys[slots].float().masked_fill(~held[..., None], 0)


def _write(out: torch.Tensor, slots: torch.Tensor, written: torch.Tensor, numbers: torch.Tensor) -> None:
    """Write ``numbers`` at ``slots`` where ``written``, without counting how many."""
    # The rest goes to a slot past the end, which is cut off.
    longer = torch.cat([out, out.new_empty(1)])
    longer[torch.where(written, slots, len(out))] = numbers
    out.copy_(longer[:-1])


def _sum_cosines(tiles: torch.Tensor, held: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sum each key's cosines to the keys that do not spare it, float32 (n_segments, longest)."""
    n_segments, longest, _ = tiles.shape
    inverse = 1 / (torch.linalg.vector_norm(tiles, dim=2) + 1e-8)
    entries = torch.arange(longest, device=tiles.device)
    sums = torch.zeros_like(inverse)
    for rows in entries.split(max(1, _MOST_NUMBERS // (n_segments * longest))):
        cosines = tiles[:, rows] @ tiles.mT * inverse[:, rows, None] * inverse[:, None]
        counts = held[:, rows, None] & held[:, None] & (rows[:, None] != entries)
        duplicates = torch.where((cosines > threshold) & counts, entries, -1)
        counts &= entries != duplicates.amax(2, keepdim=True)
        sums += torch.where(counts, cosines, 0).sum(1)
    return sums
