"""The kernels that score entries, in torch, as ``twins`` has the others."""

from __future__ import annotations

import torch
from torch.nn import functional

from simulator.policies.parts import refuse_unless
from validate.eviction.kernels.twins import blocks, put, slots_of


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
    """Compute ``kernels.importance.window_importance``."""
    refuse_unless(queries.dtype == keys.dtype, "the queries' type", queries.dtype, f"{keys.dtype}, as keys")
    n_columns = queries.shape[1] * queries.shape[2]
    for some in blocks(len(starts), longest * max(n_columns, keys.shape[1])):
        slots, held = slots_of(starts[some], lengths[some], longest)
        is_candidate = slots_of(starts[some], lengths[some] - window, longest)[1]
        tiles = _tiles(keys, slots, held)
        logits = (queries[some].float() @ tiles.mT[:, None]).amax(1) * scale
        weights = logits.masked_fill(~is_candidate[:, None], float("-inf")).softmax(2)
        put(importance, slots, weights.mean(1), is_candidate)


def redundancy(
    keys: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    redundancy: torch.Tensor,
    *,
    threshold: float,
    longest: int,
) -> None:
    """Compute ``kernels.redundancy.redundancy``."""
    for some in blocks(len(starts), longest * max(longest, keys.shape[1])):
        slots, held = slots_of(starts[some], lengths[some], longest)
        sums = _sum_cosines(_tiles(keys, slots, held), held, threshold)
        means = sums / lengths[some, None].clamp(min=1)
        put(redundancy, slots, means.masked_fill(~held, float("-inf")).softmax(1), held)


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
    """Compute ``kernels.scores.combine_scores``."""
    is_odd = kernel_size >= 1 and kernel_size % 2 == 1
    refuse_unless(is_odd, "kernel_size", kernel_size, "an odd number")
    for some in blocks(len(starts), longest):
        slots, held = slots_of(starts[some], lengths[some], longest)
        is_candidate = slots_of(starts[some], lengths[some] - window, longest)[1]
        attended = importance[slots].masked_fill(~is_candidate, float("-inf"))
        pooled = functional.max_pool1d(attended[:, None], kernel_size, 1, kernel_size // 2)[:, 0]
        if redundancy is not None:
            pooled = pooled * alpha - redundancy[slots] * (1 - alpha)
        put(scores, slots, pooled.masked_fill(~is_candidate, float("inf")), held)


def _tiles(keys: torch.Tensor, slots: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Give the keys at ``slots``, float32 (n_segments, longest, head_dim), zero where none is held."""
    return keys[slots].float().masked_fill(~held[..., None], 0)


def _sum_cosines(tiles: torch.Tensor, held: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sum each key's cosines to the keys that do not spare it, float32 (n_segments, longest)."""
    n_segments, longest, _ = tiles.shape
    inverse = 1 / (torch.linalg.vector_norm(tiles, dim=2) + 1e-8)
    entries = torch.arange(longest, device=tiles.device)
    sums = torch.zeros_like(inverse)
    for block in blocks(longest, n_segments * longest):
        rows = entries[block]
        cosines = tiles[:, rows] @ tiles.mT * inverse[:, rows, None] * inverse[:, None]
        counts = held[:, rows, None] & held[:, None] & (rows[:, None] != entries)
        duplicates = torch.where((cosines > threshold) & counts, entries, -1)
        counts &= entries != duplicates.amax(2, keepdim=True)
        sums += torch.where(counts, cosines, 0).sum(1)
    return sums
