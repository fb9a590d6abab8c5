"""Attention of decoded tokens over ragged storage, every KV head of every sequence its own length."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from simulator.kernels.attention import VECTORISE, exp
from simulator.kernels.compiled import compiled
from simulator.kernels.widening import KINDS, widen_rows
from validate.eviction.kernels.ops import Ops, ops_for, takes_heads
from validate.models.causal import causal_attention

# Keys gathered at once by the portable path, in elements: 64 MiB of float32.
_BLOCK_ELEMENTS = 2**24
# Entries of a block of the compiled path, and so many that threads are worth waking.
_ROWS, _ENTRIES_WORTH_THREADS = 64, 2**12


def attend_ragged(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    scale: float,
) -> torch.Tensor:
    """Attend from one token per sequence to the entries its KV heads hold.

    Parameters
    ----------
    queries : Tensor, shape (n_rows, n_query_heads, head_dim)
    keys, values : Tensor, shape (capacity, head_dim)
        The pool.
    starts, lengths : int64 (n_rows, n_kv_heads)
        Where each KV head's entries stand in the pool, and how many there are, at least one.
    scale : float

    Returns
    -------
    Tensor, shape (n_rows, n_query_heads, head_dim), dtype of ``queries``
    """
    if queries.device.type == "cpu" and str(keys.dtype).removeprefix("torch.") in KINDS:
        return _attend_compiled(queries, keys, values, starts, lengths, scale)
    if queries.device.type == "cuda" and has_kernels(queries, starts.size):
        return attend_by(ops_for(queries.device), queries, keys, values, starts, lengths, scale)
    return attend_padded(queries, keys, values, starts, lengths, scale)


def attend_span(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    scale: float,
) -> torch.Tensor:
    """Attend from several tokens per sequence, the last ones that its KV heads hold, each up to itself.

    Parameters
    ----------
    queries : Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
    keys, values, starts, lengths, scale
        As of `attend_ragged`.

    Returns
    -------
    Tensor, shape (n_rows, n_query_heads, n_new, head_dim), dtype of ``queries``
    """
    grouped = queries.unflatten(1, (starts.shape[1], -1))
    output = torch.empty_like(grouped)
    for (row, kv_head), start in np.ndenumerate(starts):
        held = slice(int(start), int(start + lengths[row, kv_head]))
        output[row, kv_head], _ = causal_attention(
            grouped[row, kv_head], keys[None, held], values[None, held], scale
        )
    return output.flatten(1, 2)


def has_kernels(queries: torch.Tensor, n_segments: int) -> bool:
    """Say whether the GPU kernels know such heads."""
    n_rows, n_query_heads, head_dim = queries.shape
    return takes_heads(head_dim, n_rows * n_query_heads // n_segments)


def attend_by(
    ops: Ops,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    scale: float,
) -> torch.Tensor:
    """Compute ``attend_ragged`` by the operations of a device."""
    queries = queries.contiguous()
    output = torch.empty_like(queries)
    # Both in one copy: the host decides where entries stand, and says so anew in every step.
    layout = torch.from_numpy(np.stack([starts.reshape(-1), lengths.reshape(-1)])).to(queries.device)
    longest = int(lengths.max())
    ops.attend(queries, keys, values, layout[0], layout[1].int(), output, scale=scale, longest=longest)
    return output


def attend_padded(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    scale: float,
) -> torch.Tensor:
    """Compute ``attend_ragged`` on any device: heads of like length are gathered and padded together."""
    n_rows, n_kv_heads = starts.shape
    width = keys.shape[1]
    grouped = queries.reshape(n_rows * n_kv_heads, -1, width).float()
    output = torch.empty_like(grouped)
    flat_starts, flat_lengths = starts.reshape(-1), lengths.reshape(-1)
    for block in blocks_of_like_length(flat_lengths, _BLOCK_ELEMENTS // width):
        slots = np.arange(flat_lengths[block].max())
        absent = torch.from_numpy(slots >= flat_lengths[block, None]).to(keys.device)
        index = np.minimum(flat_starts[block, None] + slots, len(keys) - 1)
        index = torch.from_numpy(index).to(keys.device)
        rows = torch.from_numpy(block).to(keys.device)
        logits = (grouped[rows] * scale) @ keys[index].float().transpose(1, 2)
        weights = logits.masked_fill_(absent[:, None], -torch.inf).softmax(-1)
        # Slots past the end may hold anything, also what is not a number.
        held = values[index].float().masked_fill_(absent[:, :, None], 0.0)
        output[rows] = weights @ held
    return output.reshape(queries.shape).to(queries.dtype)


def blocks_of_like_length(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Group numbers 0, 1, ... by ``lengths``, so that a group padded to its longest has ``most`` slots.

    One that is longer than that is alone.
    """
    # The longest first: it says how many fit beside it.
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        fitting = max(1, most // int(lengths[order[first]]))
        yield order[first : first + fitting]
        first += fitting


def _attend_compiled(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    scale: float,
) -> torch.Tensor:
    grouped = queries.reshape(starts.size, -1, queries.shape[-1]).float().contiguous().numpy()
    output = np.empty_like(grouped)
    flat_starts, flat_lengths = starts.reshape(-1), lengths.reshape(-1)
    kind = KINDS[str(keys.dtype).removeprefix("torch.")]

    def attend(segments: np.ndarray) -> None:
        _attend(
            *(grouped, keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize, kind),
            *(flat_starts, flat_lengths, segments, np.float32(scale), output),
        )

    n_threads = torch.get_num_threads()
    if n_threads == 1 or flat_lengths.sum() < _ENTRIES_WORTH_THREADS:
        attend(np.arange(starts.size))
    else:
        # Neighbours in length to different threads.
        by_length = np.argsort(flat_lengths, kind="stable")
        list(_threads(n_threads).map(attend, [by_length[first::n_threads] for first in range(n_threads)]))
    return torch.from_numpy(output).reshape(queries.shape).to(queries.dtype)


@cache
def _threads(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


@compiled(nogil=True, fastmath={"nnan", "nsz"})
def _largest(values, n):
    # Logits are finite; a maximum vectorises only if NaN may be ignored.
    best = values[0]
    for j in range(n):
        best = max(best, values[j])
    return best


@compiled(nogil=True, fastmath=VECTORISE)
def _attend(queries, keys_at, values_at, stride, kind, starts, lengths, segments, scale, output):
    _, group_size, width = queries.shape
    weights = np.empty((group_size, lengths.max()), np.float32)
    # A block of entries, made float32 once for all query heads of a group.
    block = np.empty(_ROWS * width, np.float32)
    rows = block.reshape(_ROWS, width)
    for segment in segments:
        first, n = starts[segment], lengths[segment]
        for start in range(0, n, _ROWS):
            n_rows = min(_ROWS, n - start)
            widen_rows(keys_at + (first + start) * stride, stride, kind, n_rows, width, block, 0, width)
            for member in range(group_size):
                query = queries[segment, member]
                for j in range(n_rows):
                    product = np.float32(0.0)
                    for i in range(width):
                        product += query[i] * rows[j, i]
                    weights[member, start + j] = product * scale
        for member in range(group_size):
            own = weights[member]
            largest = _largest(own, n)
            total = np.float32(0.0)
            for j in range(n):
                own[j] = exp(own[j] - largest)
                total += own[j]
            for j in range(n):
                own[j] /= total
            output[segment, member] = np.float32(0.0)
        for start in range(0, n, _ROWS):
            n_rows = min(_ROWS, n - start)
            widen_rows(values_at + (first + start) * stride, stride, kind, n_rows, width, block, 0, width)
            for member in range(group_size):
                mixed = output[segment, member]
                for j in range(n_rows):
                    weight = weights[member, start + j]
                    for i in range(width):
                        mixed[i] += weight * rows[j, i]
