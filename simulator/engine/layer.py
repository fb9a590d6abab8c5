"""One layer of one request under a policy: measure a span, divide over heads, compress."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.engine.compression import Compressor, Held
from simulator.engine.sampling import Sample
from simulator.engine.shift import Sensitivities, head_outputs
from simulator.kernels.ledger import Ledger
from simulator.kernels.spans import WindowProducts, span_mass
from simulator.kernels.widening import widen
from simulator.policies.contract import asked_to_fire
from simulator.policies.language import Policy
from simulator.policies.protection import Ends
from simulator.policies.rope import Rope
from simulator.policies.view import CacheView
from traces.numbers import to_float32
from traces.trace import Trace

# Tokens read at once; bounds the memory of long spans.
_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Retained:
    """Who one KV head retains after a compression: ``positions`` int32 (n_entries,), in slot order."""

    layer: int
    kv_head: int
    compression: int
    n_tokens: int
    positions: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """A layer's memory at a compression: head ``budgets`` in force, ``lengths`` after it; (n_kv_heads,)."""

    layer: int
    compression: int
    n_tokens: int
    budgets: np.ndarray
    lengths: np.ndarray


class LayerReplay:
    """Follows who is retained in one layer and what attention finds there.

    Attributes
    ----------
    ledger : Ledger
    compressor : Compressor
        Decides who stays.
    mass : float32 (n_measured_heads, n_sampled)
        Retained attention mass of the measured query heads at the sampled decode steps.
    shift : float32 (n_draws, n_sampled)
        How much what the layer lost moves the log-probabilities of drawn tokens; see `Sensitivities`.
    held : int64 (n_steps,)
        Entries held during the attention of every decode step.
    retained : list of Retained
        Filled if ``keep_retained``.
    divisions : list of Division
        One per compression.
    """

    def __init__(
        self,
        trace: Trace,
        layer: int,
        policy: Policy,
        entries: int,
        *,
        protected: Ends,
        seed: int,
        keep_retained: bool,
        sample: Sample,
        mass: np.ndarray,
        sensitivities: Sensitivities | None = None,
        rope: Rope | None = None,
        table: np.ndarray | None = None,
    ) -> None:
        shape = trace.shape
        n_steps = trace.total_tokens - trace.prompt_tokens
        row = sample.row_of(layer)
        self._kv_heads = [] if row is None else sample.kv_heads[row].tolist()
        self._steps = sample.steps
        self.trace, self.layer, self.policy = trace, layer, policy
        # The trace builds its shape anew each time.
        self._shape, self._scale = shape, trace.scale
        self.compressor = Compressor(
            policy,
            layer,
            entries,
            protected=protected,
            n_kv_heads=shape.n_kv_heads,
            prompt_tokens=trace.prompt_tokens,
            scale=trace.scale,
            seed=seed,
            rope=rope,
            table=table,
        )
        self._sensitivities = sensitivities
        self._with_values = policy.evicts and ("values" in policy.scorer.needs or sensitivities is not None)
        # Without evictions nothing is scored and every mass is 1: no key will ever be read.
        width = shape.head_dim if policy.evicts else 0
        self.ledger = Ledger(
            shape.n_kv_heads, width, trace.total_tokens, shape.dtype, with_values=self._with_values
        )
        # A head that never evicted holds the full cache, whose mass is 1 by definition.
        self.mass = mass
        self.mass[:] = 1
        n_draws = 0 if sensitivities is None else sensitivities.n_draws
        self.shift = np.zeros((n_draws, len(sample.steps)), np.float32)
        self.held = np.zeros(n_steps, np.int64)
        self.retained: list[Retained] = []
        self.divisions: list[Division] = []
        self.n_evicted = 0
        self._keep_retained = keep_retained
        # Mapped once: a map costs more than the few tokens of a short span.
        names = ("queries", "keys", "lse", *(("values",) if self._with_values else ()))
        self._stored = {name: trace.stored(layer, name) for name in names}
        self._token_ids = trace.token_ids
        self._n_tokens = 0
        reused = policy.scorer.window if policy.evicts and policy.scorer.reuses_products else 0
        # Of a wide window they would take more memory than the keys.
        is_wide = reused * shape.group_size > shape.head_dim
        self._n_reused = 0 if is_wide or policy.scorer.sees_span else reused
        self._products = WindowProducts(shape.n_kv_heads, self._n_reused * shape.group_size)

    def prefill(self) -> None:
        """Take in the prompt; its own attention sees all of it."""
        self._n_tokens = self.trace.prompt_tokens
        self._append(0, self._n_tokens)

    def next_compression(self) -> int | None:
        """Give the token count of the next compression, or None for never."""
        trigger = self.policy.trigger
        earliest = self.compressor.next_compression(self._n_tokens, self.ledger.n_entries)
        if earliest is None or (earliest == self._n_tokens == self.trace.prompt_tokens):
            return earliest
        if not trigger.reads_tokens:
            return earliest
        fires = asked_to_fire(trigger, self._token_ids[earliest - 1 :])
        return earliest + int(fires.argmax()) if fires.any() else None

    def advance(self, n_tokens: int) -> None:
        """Decode up to ``n_tokens`` tokens: append their entries and measure their attention."""
        while self._n_tokens < n_tokens:
            self._advance_block(min(n_tokens, self._n_tokens + _BLOCK_TOKENS))

    def _advance_block(self, stop: int) -> None:
        start, shape = self._n_tokens, self._shape
        n_tokens, step = stop - start, start - self.trace.prompt_tokens
        before = self.ledger.n_entries
        self.held[step : step + n_tokens] = before + shape.n_kv_heads * np.arange(1, n_tokens + 1)
        self._append(start, stop)
        self._n_tokens = stop
        self._products.forget()
        if not self._kv_heads:
            return
        sampled = slice(*np.searchsorted(self._steps, (step, step + n_tokens)))
        offsets = self._steps[sampled] - step
        # A slice where it is one: no copy of what is mapped.
        tokens = slice(start, stop) if len(offsets) == n_tokens else start + offsets
        # A head that still holds everything has mass 1.
        evicted = [row for row, head in enumerate(self._kv_heads) if self.ledger.lengths[head] != stop]
        if evicted and len(offsets):
            self._measure(evicted, tokens, n_tokens, offsets, sampled)

    def _measure(
        self,
        rows: list[int],
        tokens: slice | np.ndarray,
        n_tokens: int,
        offsets: np.ndarray,
        sampled: slice,
    ) -> None:
        """Write the mass that queries find in what some of the measured KV heads hold.

        ``tokens`` are those whose queries are measured, at ``offsets`` among the ``n_tokens`` just appended;
        ``sampled`` is where their mass belongs.
        """
        # A slice where it is all of them, which is quicker.
        is_every = len(rows) == self._shape.n_kv_heads
        kv_heads = slice(None) if is_every else [self._kv_heads[row] for row in rows]
        is_whole = is_every and len(offsets) == n_tokens
        mass = span_mass(
            self.ledger.multiplied,
            kv_heads,
            (self.ledger.lengths[kv_heads] - n_tokens)[:, None] + offsets,
            self._of_heads("queries", kv_heads, tokens),
            self._of_heads("lse", kv_heads, tokens),
            dtype=self._shape.dtype,
            scale=self._scale,
            products=self._products if is_whole and 0 < self._n_reused <= n_tokens else None,
        )
        by_head = self.mass.reshape(len(self._kv_heads), -1, self.mass.shape[1])
        by_head[slice(None) if is_every else rows, :, sampled] = mass
        if self._sensitivities is not None:
            keys, values = self.ledger.keys(), self.ledger.values()
            for row in rows:
                kv_head = self._kv_heads[row]
                queries = to_float32(self._of_heads("queries", [kv_head], tokens)[0], self._shape.dtype)
                seen = self.ledger.lengths[kv_head] - n_tokens + offsets + 1
                outputs = head_outputs(queries, keys[kv_head], values[kv_head], seen, self._scale)
                self.shift[:, sampled] += self._sensitivities.change(self.layer, kv_head, sampled, outputs)

    def _of_heads(self, name: str, kv_heads: slice | list[int], tokens: slice | np.ndarray) -> np.ndarray:
        """Give what is stored of query heads by KV head, (n_kv_heads, group_size, n_tokens, ...)."""
        stored = self._stored[name]
        return stored.reshape(self._shape.n_kv_heads, -1, *stored.shape[1:])[:, :, tokens][kv_heads]

    def reallocate(self) -> None:
        """Divide the layer's budget over its KV heads, before other layers and this one compress."""
        self.compressor.divide(*self._shown())

    def compress(self) -> None:
        """Evict from every head what exceeds its budget, divided anew if that is due and not done."""
        compression = self.compressor.n_compressions
        n_held = self.ledger.n_entries
        self.ledger.retain(self.compressor.decide(*self._shown()), self._n_tokens)
        self._products.forget()
        self.n_evicted += n_held - self.ledger.n_entries
        if self._keep_retained:
            self.retained += [
                Retained(self.layer, kv_head, compression, self._n_tokens, kept.copy())
                for kv_head, kept in enumerate(self.ledger.positions())
            ]
        at = self.layer, compression, self._n_tokens
        self.divisions.append(Division(*at, self.compressor.budgets.copy(), self.ledger.lengths.copy()))

    def complete(self) -> None:
        """Let go of the keys; what was measured stays."""
        self.ledger.release()
        self.compressor.forget()
        self._products.release()

    def views(self) -> list[CacheView]:
        """Show what every KV head holds, with the queries that the layer allocator observes."""
        n_queries = min(self._n_tokens, self.policy.layers.window)
        held = Held(self.ledger.keys(), self.ledger.positions())
        return self.compressor.view(held, self._last_queries(n_queries), self._n_tokens).heads

    def _append(self, start: int, stop: int) -> None:
        values = self._stored["values"][:, start:stop] if self._with_values else None
        self.ledger.append(start, self._stored["keys"][:, start:stop], values)

    def _last_queries(self, n: int) -> np.ndarray:
        """Give the last queries, oldest first; float32 (n_query_heads, n, head_dim)."""
        last = self._stored["queries"][:, self._n_tokens - n : self._n_tokens]
        return widen(last, self._shape.dtype)

    def _shown(self) -> tuple[Held, np.ndarray, int]:
        """Give what the compressor decides from: entries, last queries, and tokens in the history."""
        held = Held(
            self.ledger.keys(),
            self.ledger.positions(),
            self.ledger.values() if self._with_values else None,
            self._products.known(self.ledger.lengths),
        )
        n_queries = self.compressor.n_queries(self._n_tokens)
        return held, self._last_queries(n_queries), self._n_tokens
