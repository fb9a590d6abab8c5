"""One layer of an evicting cache: attend, append, and let the policy decide, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simulator.compression import Compressor
from simulator.policy import Policy
from validate.causal import causal_attention
from validate.eviction.kernels import attend_ragged
from validate.eviction.pool import LayerPool

_NEVER = np.iinfo(np.int64).max
# Memory is taken for at most so many tokens ahead, and all sequences' together: taking it copies the block.
_AHEAD = 256


class EvictingLayer:
    """Entries of one layer, and who of them stays, for a batch of sequences.

    A compression takes effect after the attention of the token that triggered it.

    Parameters
    ----------
    layer : int
    policy : Policy
    entries : sequence of int
        The layer's budget per KV head, for each row.
    prompts : sequence of int
        Prompt tokens of each row.
    seeds : sequence of int
        For scorers that draw at random.

    Attributes
    ----------
    pool : LayerPool
    held : int64 (n_rows,)
        Entries over all KV heads during the latest attention.
    n_tokens : int64 (n_rows,)
        Tokens in each row's history.
    """

    def __init__(
        self, layer: int, policy: Policy, entries: Sequence[int], prompts: Sequence[int], seeds: Sequence[int]
    ) -> None:
        self.layer, self.policy = layer, policy
        self.entries, self.seeds = np.array(entries), np.array(seeds)
        self.n_tokens = np.array(prompts, np.int64)
        self.held = np.zeros(len(self.n_tokens), np.int64)
        self._due = np.full(len(self.n_tokens), _NEVER)

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend to whole prompts and take in what of them is to stay.

        Parameters
        ----------
        query : Tensor, shape (n_rows, n_query_heads, length, head_dim)
        key, value : Tensor, shape (n_rows, n_kv_heads, length, head_dim)
            Rows shorter than ``length`` stand at its end.
        scale : float

        Returns
        -------
        Tensor, shape (n_rows, n_query_heads, length, head_dim); zero where a row has no token.
        """
        n_rows, n_kv_heads, length, width = key.shape
        self.scale = scale
        self.compressors = [
            Compressor(
                self.policy,
                self.layer,
                int(self.entries[row]),
                n_kv_heads=n_kv_heads,
                prompt_tokens=int(self.n_tokens[row]),
                scale=scale,
                seed=int(self.seeds[row]),
            )
            for row in range(n_rows)
        ]
        padding = length - self.n_tokens
        output = torch.zeros_like(query)
        for row, first in enumerate(padding.tolist()):
            output[row, :, first:], _ = causal_attention(
                query[row, :, first:], key[row, :, first:], value[row, :, first:], scale
            )
        # The last queries of every row, in a ring whose newest stands at ``_newest``.
        window = self.policy.scorer.window if self.policy.evicts else 0
        self._queries = query.new_zeros(n_rows, query.shape[1], window, width)
        if window:
            seen = query[:, :, -window:]
            self._queries[:, :, window - seen.shape[2] :] = seen
        self._newest = window - 1
        self.held = self.n_tokens * n_kv_heads
        held = [self._prompt_survivors(row, key[row, :, first:]) for row, first in enumerate(padding)]
        self.pool = LayerPool(n_rows, n_kv_heads, width, key.dtype, key.device)
        n_entries = np.array([sum(map(len, heads)) for heads in held])
        for row in range(n_rows):
            self._schedule(row, int(n_entries[row]))
        self.pool.fill(key, value, held, padding, self._room())
        return output

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Append one or more tokens per row, attend from each to what is there, and compress what is due.

        Parameters
        ----------
        query : Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
        key, value : Tensor, shape (n_rows, n_kv_heads, n_new, head_dim)

        Returns
        -------
        Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
        """
        outputs = []
        for at in range(query.shape[2]):
            if (self.pool.room == 0).any():
                self.pool.make_room(self._room())
            self.pool.append(key[:, :, at], value[:, :, at], self.n_tokens)
            self.n_tokens = self.n_tokens + 1
            self.held = self.pool.lengths.sum(1)
            outputs.append(self.attend(query[:, :, at]))
            if self._queries.shape[2]:
                self._newest = (self._newest + 1) % self._queries.shape[2]
                self._queries[:, :, self._newest] = query[:, :, at]
            for row in np.flatnonzero(self._due <= self.n_tokens).tolist():
                self.compress(row)
        return torch.stack(outputs, 2)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Attend from the newest token to what its row holds; (n_rows, n_query_heads, head_dim)."""
        pool = self.pool
        return attend_ragged(query, pool.keys, pool.values, pool.starts, pool.lengths, self.scale)

    def compress(self, row: int) -> None:
        """Evict from every KV head of one row what exceeds its budget."""
        heads = [self.pool.segment(row, kv_head) for kv_head in range(self.pool.lengths.shape[1])]
        keys = [to_array(self.pool.keys[slots]) for slots in heads]
        positions = [self.pool.positions[slots] for slots in heads]
        survivors = self._decide(row, keys, positions)
        n_kept = sum(
            len(held) if slots is None else len(slots)
            for held, slots in zip(positions, survivors, strict=True)
        )
        self._schedule(row, n_kept)
        self.pool.retain(row, survivors, int(self._room()[row]))

    def keep_rows(self, rows: np.ndarray) -> None:
        """Free all other rows."""
        self.pool.keep_rows(rows)
        self.compressors = [self.compressors[row] for row in rows]
        self._queries = self._queries[torch.from_numpy(rows).to(self._queries.device)]
        for name in ("entries", "seeds", "n_tokens", "held", "_due"):
            setattr(self, name, getattr(self, name)[rows])

    def _prompt_survivors(self, row: int, keys: torch.Tensor) -> list[np.ndarray]:
        """Choose which positions of a row's prompt stay in each KV head."""
        n_tokens = int(self.n_tokens[row])
        everyone = np.arange(n_tokens, dtype=np.int32)
        held = [everyone] * len(keys)
        if self.compressors[row].next_compression(n_tokens, n_tokens * len(keys)) != n_tokens:
            return held
        survivors = self._decide(row, list(to_array(keys)), held)
        return [everyone if slots is None else slots for slots in survivors]

    def _decide(
        self, row: int, keys: Sequence[np.ndarray], positions: Sequence[np.ndarray]
    ) -> list[np.ndarray | None]:
        compressor, n_tokens = self.compressors[row], int(self.n_tokens[row])
        window = min(self._queries.shape[2], n_tokens)
        queries = self._queries[row].roll(-1 - self._newest, 1)
        queries = to_array(queries[:, queries.shape[1] - window :])
        scores = compressor.score(keys, positions, queries, n_tokens)
        if compressor.reallocation_due(n_tokens):
            compressor.reallocate(scores, n_tokens)
        return compressor.survivors(scores, positions)

    def _schedule(self, row: int, n_entries: int) -> None:
        due = self.compressors[row].next_compression(int(self.n_tokens[row]), n_entries)
        self._due[row] = _NEVER if due is None else due

    def _room(self) -> np.ndarray:
        return np.minimum(self._due - self.n_tokens, _AHEAD)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Give a tensor as float32 in main memory, without a copy if it is that already."""
    return tensor.detach().float().cpu().numpy()
