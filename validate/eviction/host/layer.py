"""One layer of an evicting cache: attend, append, and let the policy decide, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simulator.engine.compression import Compressor, Held
from simulator.policies.contract import asked_to_fire
from simulator.policies.language import Policy
from simulator.policies.protection import Ends
from simulator.policies.rope import Rope
from simulator.policies.view import CacheView
from validate.eviction.host.attention import attend_ragged, attend_span
from validate.eviction.host.pool import LayerPool
from validate.eviction.prompts import attend_prompts

_NEVER = np.iinfo(np.int64).max
# Memory is taken for at most so many tokens ahead, and all sequences' together: taking it copies the block.
_AHEAD = 256
_OVERDUE_AHEAD = 16


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
    protected : sequence of Ends
        First positions and last entries of each row that stay.
    rope : Rope, optional
        For scorers that need it.
    table : float64 (n_kv_heads,), optional
        What the head allocator knows of the layer's heads beforehand.

    Attributes
    ----------
    pool : LayerPool
    held : int64 (n_rows,)
        Entries over all KV heads during the latest attention.
    n_tokens : int64 (n_rows,)
        Tokens in each row's history.
    """

    def __init__(
        self,
        layer: int,
        policy: Policy,
        entries: Sequence[int] | np.ndarray,
        prompts: Sequence[int] | np.ndarray,
        seeds: Sequence[int],
        protected: Sequence[Ends],
        rope: Rope | None = None,
        table: np.ndarray | None = None,
    ) -> None:
        self.layer, self.policy = layer, policy
        self._protected, self._rope, self._table = protected, rope, table
        self._with_values = policy.evicts and "values" in policy.scorer.needs
        # A compression waits for the other layers where budgets move between them.
        self._waits = policy.divides_layers_again
        self.entries, self.seeds = np.array(entries), np.array(seeds)
        self.n_tokens = np.array(prompts, np.int64)
        self.held = np.zeros(len(self.n_tokens), np.int64)
        self._due = np.full(len(self.n_tokens), _NEVER)
        self._overdue = np.zeros(len(self.n_tokens), bool)

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
                protected=self._protected[row],
                n_kv_heads=n_kv_heads,
                prompt_tokens=int(self.n_tokens[row]),
                scale=scale,
                seed=int(self.seeds[row]),
                rope=self._rope,
                table=self._table,
            )
            for row in range(n_rows)
        ]
        padding = length - self.n_tokens
        output = attend_prompts(query, key, value, padding, scale)
        self._queries, self._newest = query, length - 1
        self._resize_ring(self._most_wanted(length))
        self.held = self.n_tokens * n_kv_heads
        held = [
            self._prompt_survivors(row, key[row, :, first:], value[row, :, first:])
            for row, first in enumerate(padding)
        ]
        self.pool = LayerPool(n_rows, n_kv_heads, width, key.dtype, key.device)
        n_entries = np.array([sum(map(len, heads)) for heads in held])
        for row in range(n_rows):
            self._schedule(row, int(n_entries[row]))
        self.pool.fill(key, value, held, padding, self._room())
        if not self._waits:
            self._let_go_of_prompts()
        return output

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_ids: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Append one or more tokens per row, attend from each to what is there, and compress what is due.

        Between two compressions nothing but tokens comes in, so that all of them attend at once.

        Parameters
        ----------
        query : Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
        key, value : Tensor, shape (n_rows, n_kv_heads, n_new, head_dim)
        token_ids : int (n_rows, n_new), optional
            For triggers that wait for certain tokens.

        Returns
        -------
        Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
        """
        outputs, first = [], 0
        while first < query.shape[2]:
            if (self.pool.room == 0).any():
                self.pool.make_room(self._room())
            most = min(query.shape[2] - first, int(self.pool.room.min()))
            due = self._tokens_until_due(None if token_ids is None else token_ids[:, first:])
            n_new = min(most, int(due.min()))
            new = slice(first, first + n_new)
            self.pool.append(key[:, :, new], value[:, :, new], self.n_tokens)
            self.n_tokens = self.n_tokens + n_new
            self.held = self.pool.lengths.sum(1)
            outputs.append(self.attend(query[:, :, new]))
            self._remember(query[:, :, new])
            self._overdue = due == n_new
            if not self._waits:
                self.compress_overdue()
            first += n_new
        return torch.cat(outputs, 2)

    def tokens_until_due(self) -> int:
        """Give how many tokens the batch can take until some row may be due for a compression."""
        return int(self._tokens_until_due(None).min())

    def _tokens_until_due(self, token_ids: np.ndarray | None) -> np.ndarray:
        """Give the number of tokens with which each row will be due, int64 (n_rows,).

        Where triggers wait for certain tokens, it is known as far as ``token_ids``, (n_rows, n_new), go.
        """
        due = np.maximum(self._due - self.n_tokens, 1)
        if token_ids is not None:
            for row, earliest in enumerate(due.tolist()):
                fires = asked_to_fire(self.policy.trigger, token_ids[row, earliest - 1 :])
                due[row] = earliest + fires.argmax() if fires.any() else _NEVER
        return due

    def compress_overdue(self) -> None:
        """Compress every row for which the latest token made it due."""
        for row in np.flatnonzero(self._overdue).tolist():
            self.compress(row)
        self._overdue = np.zeros(len(self.n_tokens), bool)
        if self._waits and self._queries.shape[2] > 2 * max(_AHEAD, self._n_wanted()):
            self._let_go_of_prompts()

    def views(self, row: int) -> list[CacheView]:
        """Show what every KV head of a row holds, with the queries that the layer allocator observes."""
        n_tokens = int(self.n_tokens[row])
        queries = self._last_queries(row, min(self.policy.layers.window, n_tokens))
        return self.compressors[row].view(self._held(row), queries, n_tokens).heads

    def resize(self, row: int, entries: int) -> None:
        """Change a row's budget per KV head; a compression that is due now stays so."""
        self.compressors[row].resize(entries)
        if not self._overdue[row]:
            self._schedule(row, int(self.pool.lengths[row].sum()))
            self._overdue[row] = self._due[row] == self.n_tokens[row]

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Attend from the newest tokens to what their rows hold; (n_rows, n_query_heads, n_new, head_dim)."""
        pool = self.pool
        if query.shape[2] > 1:
            return attend_span(query, pool.keys, pool.values, pool.starts, pool.lengths, self.scale)
        return attend_ragged(
            query[:, :, 0], pool.keys, pool.values, pool.starts, pool.lengths, self.scale
        ).unsqueeze(2)

    def compress(self, row: int) -> None:
        """Evict from every KV head of one row what exceeds its budget."""
        held = self._held(row)
        survivors = self._decide(row, held)
        n_kept = sum(
            len(own) if slots is None else len(slots)
            for own, slots in zip(held.positions, survivors, strict=True)
        )
        self._schedule(row, n_kept)
        self.pool.retain(row, survivors, int(self._room()[row]))

    def keep_rows(self, rows: np.ndarray) -> None:
        """Free all other rows."""
        self.pool.keep_rows(rows)
        self.compressors = [self.compressors[row] for row in rows]
        self._queries = self._queries[torch.from_numpy(rows).to(self._queries.device)]
        for name in ("entries", "seeds", "n_tokens", "held", "_due", "_overdue"):
            setattr(self, name, getattr(self, name)[rows])

    def _prompt_survivors(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> list[np.ndarray]:
        """Choose which positions of a row's prompt stay in each KV head."""
        n_tokens = int(self.n_tokens[row])
        everyone = np.arange(n_tokens, dtype=np.int32)
        held = [everyone] * len(keys)
        due = self.compressors[row].next_compression(n_tokens, n_tokens * len(keys)) == n_tokens
        self._overdue[row] = due and self._waits
        if not due or self._waits:
            return held
        own_values = list(to_array(values)) if self._with_values else None
        survivors = self._decide(row, Held(list(to_array(keys)), held, own_values))
        return [everyone if slots is None else slots for slots in survivors]

    def _held(self, row: int) -> Held:
        heads = [self.pool.segment(row, kv_head) for kv_head in range(self.pool.lengths.shape[1])]
        keys = [to_array(self.pool.keys[slots]) for slots in heads]
        values = [to_array(self.pool.values[slots]) for slots in heads] if self._with_values else None
        return Held(keys, [self.pool.positions[slots] for slots in heads], values)

    def _decide(self, row: int, held: Held) -> list[np.ndarray | None]:
        compressor, n_tokens = self.compressors[row], int(self.n_tokens[row])
        queries = self._last_queries(row, compressor.n_queries(n_tokens))
        return compressor.decide(held, queries, n_tokens)

    def _most_wanted(self, prompt_tokens: int) -> int:
        """Give how many of the last queries the policy may ask for after the prompts."""
        policy = self.policy
        if not policy.evicts:
            return 0
        least = prompt_tokens if policy.scorer.sees_span else 0
        return max(policy.scorer.window, policy.layers.window, least)

    def _remember(self, query: torch.Tensor) -> None:
        """Put each row's newest queries, (n_rows, n_query_heads, n_new, head_dim), into the ring."""
        capacity = self._queries.shape[2]
        if not capacity:
            return
        if self.policy.scorer.sees_span and self._n_wanted() > capacity:
            self._resize_ring(2 * self._n_wanted())
            capacity = self._queries.shape[2]
        query = query[:, :, -capacity:]
        at = (self._newest + 1 + torch.arange(query.shape[2], device=query.device)) % capacity
        self._queries[:, :, at] = query
        self._newest = int(at[-1])

    def _n_wanted(self) -> int:
        """Give how many queries the policy may ask for now, of the row with the longest span."""
        counts = zip(self.compressors, self.n_tokens.tolist(), strict=True)
        return max((compressor.n_queries(n) for compressor, n in counts), default=0)

    def _resize_ring(self, capacity: int) -> None:
        """Make room for so many queries, and keep the newest of those that are there."""
        ring = self._queries
        kept = ring.roll(-1 - self._newest, 2)[:, :, max(0, ring.shape[2] - capacity) :]
        self._queries = ring.new_zeros(*ring.shape[:2], capacity, ring.shape[3])
        self._queries[:, :, capacity - kept.shape[2] :] = kept
        self._newest = capacity - 1

    def _let_go_of_prompts(self) -> None:
        """Shrink a ring that held whole prompts, once those are compressed."""
        if self.policy.evicts and self.policy.scorer.sees_span:
            self._resize_ring(max(self._n_wanted(), self.policy.layers.window, 1))

    def _last_queries(self, row: int, n: int) -> np.ndarray:
        """Give a row's last queries, oldest first; float32 (n_query_heads, n, head_dim)."""
        at = (self._newest + 1 + torch.arange(-n, 0)) % max(1, self._queries.shape[2])
        return to_array(self._queries[row][:, at.to(self._queries.device)])

    def _schedule(self, row: int, n_entries: int) -> None:
        due = self.compressors[row].next_compression(int(self.n_tokens[row]), n_entries)
        self._due[row] = _NEVER if due is None else due

    def _room(self) -> np.ndarray:
        # What waits for a certain token has no known end.
        ahead = np.where(self._due > self.n_tokens, self._due - self.n_tokens, _OVERDUE_AHEAD)
        return np.minimum(ahead, _AHEAD)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Give a tensor as float32 in main memory, without a copy if it is that already."""
    return tensor.detach().float().cpu().numpy()
