"""One new token per sequence: its keys, values and position into storage, its queries into a ring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    new_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    n_tokens: torch.Tensor,
    ring: torch.Tensor | None,
) -> None:
    """Add one token per row behind what its KV heads hold; every segment has room for it.

    Parameters
    ----------
    new_keys, new_values : Tensor, shape (n_rows, n_kv_heads, head_dim)
        Like ``new_queries`` contiguous in the last dimension only.
    new_queries : Tensor, shape (n_rows, n_query_heads, head_dim)
    keys, values : Tensor, shape (capacity, head_dim)
        Written.
    positions : int32 (capacity,)
        Written.
    starts : int64 (n_segments,)
    lengths : int32 (n_segments,)
        Raised by one.
    n_tokens : int32 (n_rows,)
        Tokens of each row before this one, which is its position.
    ring : Tensor, shape (n_rows, n_query_heads, window, head_dim), contiguous, optional
        Each row's last queries, that of position p at p modulo ``window``; written unless empty.
    """
    n_rows, n_kv_heads, head_dim = new_keys.shape
    n_query_heads = new_queries.shape[1]
    window = 0 if ring is None else ring.shape[2]
    group_size = n_query_heads // n_kv_heads
    _append[(n_rows * n_kv_heads,)](
        new_keys,
        new_values,
        new_queries,
        keys,
        values,
        positions,
        starts,
        lengths,
        n_tokens,
        ring if window else new_queries,
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        *new_queries.stride()[:2],
        N_KV_HEADS=n_kv_heads,
        GROUP=group_size,
        GROUP_BLOCK=triton.next_power_of_2(group_size),
        WINDOW=window,
        HEAD_DIM=head_dim,
        # A row of 128 half-precision numbers is one access of 8 bytes for each lane of a warp.
        num_warps=1,
    )


@triton.jit
def _append(
    new_keys,
    new_values,
    new_queries,
    keys,
    values,
    positions,
    starts,
    lengths,
    n_tokens,
    ring,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    query_row_stride,
    query_head_stride,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = segment // N_KV_HEADS
    kv_head = segment % N_KV_HEADS
    width = tl.arange(0, HEAD_DIM)
    length = tl.load(lengths + segment)
    slot = tl.load(starts + segment) + length
    position = tl.load(n_tokens + row)
    key = tl.load(new_keys + row * key_row_stride + kv_head * key_head_stride + width)
    value = tl.load(new_values + row * value_row_stride + kv_head * value_head_stride + width)
    tl.store(keys + slot * HEAD_DIM + width, key)
    tl.store(values + slot * HEAD_DIM + width, value)
    tl.store(positions + slot, position)
    # No other program reads this entry.
    tl.store(lengths + segment, length + 1)
    if WINDOW > 0:
        members = tl.arange(0, GROUP_BLOCK)
        heads = kv_head * GROUP + members
        is_member = (members < GROUP)[:, None]
        source = row * query_row_stride + heads * query_head_stride
        query = tl.load(new_queries + source[:, None] + width[None, :], mask=is_member)
        target = (segment * GROUP + members) * WINDOW + position % WINDOW
        tl.store(ring + target[:, None] * HEAD_DIM + width[None, :], query, mask=is_member)
