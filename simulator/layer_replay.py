"""One layer of one request under a policy: measure a span, reallocate, compress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.contract import checked_budgets, checked_scores
from simulator.kernels import add_attention_mass
from simulator.ledger import Ledger
from simulator.policy import Policy
from simulator.selection import select_slots
from simulator.view import CacheView
from traces.numbers import to_float32
from traces.trace import Trace

# Products of one block, in float32: 8 MB stay close to the cache and bound the memory of long spans.
_BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True, slots=True, eq=False)
class Retained:
    """Who one KV head retains after a compression: ``positions`` int32 (n_entries,), in slot order."""

    layer: int
    kv_head: int
    compression: int
    n_tokens: int
    positions: np.ndarray


class LayerReplay:
    """Follows who is retained in one layer and what attention finds there.

    Attributes
    ----------
    ledger : Ledger
    total : int
        The layer's budget in entries over all KV heads.
    budgets : int64 (n_kv_heads,)
        How it is divided over the heads now.
    mass : float32 (n_query_heads, n_steps)
        Retained attention mass of every decode step.
    held : int64 (n_steps,)
        Entries held during the attention of every decode step.
    retained : list of Retained
        Filled if ``keep_retained``.
    """

    def __init__(
        self, trace: Trace, layer: int, policy: Policy, entries: int, *, seed: int, keep_retained: bool
    ) -> None:
        shape = trace.shape
        n_steps = trace.total_tokens - trace.prompt_tokens
        self.trace, self.layer, self.policy, self.seed = trace, layer, policy, seed
        self.total = entries * shape.n_kv_heads
        self.budgets = np.full(shape.n_kv_heads, entries, np.int64)
        # Without evictions nothing is scored and every mass is 1: no key will ever be read.
        width = shape.head_dim if policy.evicts else 0
        self.ledger = Ledger(shape.n_kv_heads, width, trace.total_tokens)
        self.mass = np.ones((shape.n_query_heads, n_steps), np.float32)
        self.held = np.zeros(n_steps, np.int64)
        self.retained: list[Retained] = []
        self.n_evicted = 0
        self.protection_binding = False
        self._keep_retained = keep_retained
        # Mapped once: a map costs more than the few tokens of a short span.
        self._stored = {name: trace.stored(layer, name) for name in ("queries", "keys", "lse")}
        self._n_tokens = 0
        self._n_compressions = 0
        self._last_reallocation: int | None = None
        self._scores: list[np.ndarray] | None = None

    def prefill(self) -> None:
        """Take in the prompt; its own attention sees all of it."""
        self._n_tokens = self.trace.prompt_tokens
        self._append(0, self._n_tokens)

    def next_compression(self) -> int | None:
        """Give the token count of the next compression, or None for never."""
        n_entries, n_tokens = self.ledger.n_entries, self._n_tokens
        is_prefilled = n_tokens == self.trace.prompt_tokens and self._n_compressions == 0
        if is_prefilled and self.policy.trigger.prompt == "compress" and n_entries > self.total:
            return n_tokens
        n_kv_heads = len(self.budgets)
        return self.policy.trigger.next_compression(n_tokens, n_entries, self.total, n_kv_heads)

    def reallocation_due(self, n_tokens: int) -> bool:
        """Say whether the heads' budgets are to be divided anew at a compression at ``n_tokens``."""
        delta = self.policy.heads.delta
        last = self._last_reallocation
        return delta > 0 and (last is None or n_tokens - last >= delta)

    def advance(self, n_tokens: int) -> None:
        """Decode up to ``n_tokens`` tokens: append their entries and measure their attention."""
        while self._n_tokens < n_tokens:
            longest = int(self.ledger.lengths.max())
            group_size = self.trace.shape.group_size
            # The block holds group_size * n rows of up to longest + n products each.
            fitting = max(1, _BLOCK_ELEMENTS // (group_size * (longest + 512)))
            self._advance_block(min(n_tokens, self._n_tokens + min(fitting, 512)))

    def _advance_block(self, stop: int) -> None:
        start, shape = self._n_tokens, self.trace.shape
        n_tokens, step = stop - start, start - self.trace.prompt_tokens
        before = self.ledger.n_entries
        self.held[step : step + n_tokens] = before + shape.n_kv_heads * np.arange(1, n_tokens + 1)
        self._append(start, stop)
        self._n_tokens = stop
        # A head that never evicted holds the full cache, whose mass is 1 by definition.
        partial = [h for h in range(shape.n_kv_heads) if self.ledger.lengths[h] < stop]
        if not partial:
            return
        queries = self._read("queries", start, stop)
        lse = self._stored["lse"][:, start:stop]
        scale = np.float32(self.trace.scale)
        rows = np.tile(np.arange(1, n_tokens + 1), shape.group_size)
        for kv_head in partial:
            group = slice(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
            keys = self.ledger.keys(kv_head)
            products = queries[group].reshape(-1, shape.head_dim) @ keys.T
            # The block's own entries stand last, in time order: slots past a row's own lie in its future.
            n_visible = len(keys) - n_tokens + rows
            mass = np.empty(len(products), np.float32)
            add_attention_mass(products, scale, np.ascontiguousarray(lse[group]).reshape(-1), n_visible, mass)
            self.mass[group, step : step + n_tokens] = mass.reshape(shape.group_size, n_tokens)

    def reallocate(self) -> None:
        """Divide the layer's budget over its KV heads by the scores of now."""
        self._scores = self._score_heads()
        heads, protected = self.policy.heads, self.policy.protected
        budgets, binding = heads.allocate(self._scores, self.total, protected)
        self.budgets = checked_budgets(heads.name, budgets, len(self._scores), self.total, protected)
        self.protection_binding |= binding
        self._last_reallocation = self._n_tokens

    def compress(self) -> None:
        """Evict from every head what exceeds its budget."""
        scores = self._scores or self._score_heads()
        self._scores = None
        allowed = self.budgets
        if self.policy.redistribute:
            allowed = lend_unused(self.budgets, self.ledger.lengths)
        for kv_head, n_kept in enumerate(allowed):
            positions = self.ledger.positions(kv_head)
            if len(positions) > n_kept:
                order = self.policy.scorer.slot_order
                slots = select_slots(scores[kv_head], positions, int(n_kept), order)
                self.n_evicted += len(positions) - len(slots)
                self.ledger.retain(kv_head, slots, self._n_tokens)
            if self._keep_retained:
                kept = self.ledger.positions(kv_head).copy()
                self.retained.append(
                    Retained(self.layer, kv_head, self._n_compressions, self._n_tokens, kept)
                )
        self._n_compressions += 1

    def _append(self, start: int, stop: int) -> None:
        if self.policy.evicts:
            self.ledger.append(start, self._read("keys", start, stop))
        else:
            self.ledger.append(start, np.empty((len(self.budgets), stop - start, 0), np.float32))

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        return to_float32(self._stored[name][:, start:stop], self.trace.shape.dtype)

    def _score_heads(self) -> list[np.ndarray]:
        trace, scorer, n_tokens = self.trace, self.policy.scorer, self._n_tokens
        first = max(0, n_tokens - scorer.window)
        queries = self._read("queries", first, n_tokens)
        grouped = queries.reshape(trace.shape.n_kv_heads, trace.shape.group_size, *queries.shape[1:])
        return [
            checked_scores(
                scorer,
                CacheView(
                    keys=self.ledger.keys(kv_head),
                    positions=self.ledger.positions(kv_head),
                    queries=grouped[kv_head],
                    scale=trace.scale,
                    n_tokens=n_tokens,
                    prompt_tokens=trace.prompt_tokens,
                    layer=self.layer,
                    kv_head=kv_head,
                    seed=self.seed,
                ),
            )
            for kv_head in range(trace.shape.n_kv_heads)
        ]


def lend_unused(budgets: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Hand budget that short heads cannot use to the others, in equal shares, the neediest first.

    Parameters
    ----------
    budgets, lengths : int64 (n_kv_heads,)

    Returns
    -------
    int64 (n_kv_heads,), at most ``lengths``, summing to the smaller of both totals.
    """
    lengths = np.asarray(lengths, np.int64)
    allowed = np.minimum(budgets, lengths)
    unused = int(min(budgets.sum(), lengths.sum()) - allowed.sum())
    while unused:
        needy = np.flatnonzero(allowed < lengths)
        share = max(1, unused // len(needy))
        for head in needy[np.argsort(-(lengths - allowed)[needy], kind="stable")]:
            lent = min(share, int(lengths[head] - allowed[head]), unused)
            allowed[head] += lent
            unused -= lent
    return allowed
