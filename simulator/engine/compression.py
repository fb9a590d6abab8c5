"""Who stays in one layer of one request, and when that is decided: the same for a replay and a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from simulator.engine.selection import select_slots
from simulator.policies.contract import (
    asked_allocator,
    asked_memory,
    asked_quota,
    asked_trigger,
    checked_budgets,
    checked_notes,
    checked_scores,
)
from simulator.policies.language import Policy
from simulator.policies.parts import HeadRequest
from simulator.policies.protection import Ends
from simulator.policies.rope import Rope
from simulator.policies.view import LayerView


class Held(NamedTuple):
    """What the KV heads of a layer hold, one array of each kind per KV head, in slot order.

    Attributes
    ----------
    keys : sequence of float32 (n_entries, head_dim)
    positions : sequence of int32 (n_entries,)
    values : sequence of float32 (n_entries, head_dim), optional
    products : sequence of float32 (n_entries, n_queries * group_size), optional
        Of the keys with the queries that the scorer asks for; see ``LayerView``.
    """

    keys: Sequence[np.ndarray]
    positions: Sequence[np.ndarray]
    values: Sequence[np.ndarray] | None = None
    products: Sequence[np.ndarray] | None = None


class Compressor:
    """A policy at work in one layer of one request. It holds no entries and sees them only when it scores.

    Parameters
    ----------
    policy : Policy
    layer : int
    entries : int
        The layer's budget per KV head.
    protected : Ends
        First positions and last entries that stay.
    n_kv_heads, prompt_tokens : int
    scale : float
        Attention scale.
    seed : int
        For scorers that draw at random.
    rope : Rope, optional
        For scorers that need it.
    table : float64 (n_kv_heads,), optional
        What the head allocator knows of the layer's heads beforehand.

    Attributes
    ----------
    n_protected : int
        Entries of a KV head that stay whatever is scored; none if nothing is ever evicted.
    total : int
        The layer's budget in entries over all KV heads.
    budgets : int64 (n_kv_heads,)
        How it is divided over the heads now.
    since : int
        Tokens in the history at the last compression, 0 before the first.
    n_compressions : int
    protection_binding : bool
        Whether protected entries were a lower bound that some head's budget sat on.
    """

    def __init__(
        self,
        policy: Policy,
        layer: int,
        entries: int,
        *,
        protected: Ends,
        n_kv_heads: int,
        prompt_tokens: int,
        scale: float,
        seed: int,
        rope: Rope | None = None,
        table: np.ndarray | None = None,
    ) -> None:
        self.policy, self.layer, self.prompt_tokens = policy, layer, prompt_tokens
        self.scale, self.seed, self.rope, self.table = scale, seed, rope, table
        self.n_kv_heads = n_kv_heads
        self.protected, self.n_protected = protected, sum(protected) if policy.evicts else 0
        self.resize(entries)
        self.since = self.n_compressions = 0
        self.protection_binding = False
        self._notes: list[np.ndarray] | None = None
        self._scores: list[np.ndarray] | None = None
        self._memory = asked_memory(policy.scorer)
        self._n_tokens = prompt_tokens

    def resize(self, entries: int) -> None:
        """Change the layer's budget per KV head; the heads share it alike until they are divided anew."""
        self.total = entries * self.n_kv_heads
        self.budgets = np.full(self.n_kv_heads, entries, np.int64)
        self._last_reallocation: int | None = None

    def next_compression(self, n_tokens: int, n_entries: int) -> int | None:
        """Give the token count of the next compression if nothing is evicted before, or None for never.

        A trigger that waits for certain tokens may fire later; see ``Trigger.fires_on``.

        Parameters
        ----------
        n_tokens, n_entries : int
            Tokens in the history, and entries that the layer holds, now.
        """
        trigger = self.policy.trigger
        total = int(self._quotas(n_tokens).sum())
        is_prefilled = n_tokens == self.prompt_tokens and self.n_compressions == 0
        if is_prefilled and trigger.cuts_prompt(n_entries, total):
            return n_tokens
        return asked_trigger(trigger, n_tokens, n_entries, total, self.n_kv_heads)

    def reallocation_due(self, n_tokens: int) -> bool:
        """Say whether the heads' budgets are to be divided anew at a compression at ``n_tokens``."""
        delta, last = self.policy.heads.delta, self._last_reallocation
        return delta > 0 and (last is None or n_tokens - last >= delta)

    def n_queries(self, n_tokens: int) -> int:
        """Give how many of the last queries ``score`` and ``view`` want."""
        wanted = max(self._n_scored(n_tokens), self.policy.layers.window)
        return min(wanted, n_tokens)

    def view(self, held: Held, queries: np.ndarray, n_tokens: int) -> LayerView:
        """Show what the layer holds.

        Parameters
        ----------
        held : Held
        queries : float32 (n_query_heads, n_queries, head_dim)
            The last queries, oldest first.
        n_tokens : int
        """
        return LayerView(
            keys=held.keys,
            positions=held.positions,
            queries=queries.reshape(self.n_kv_heads, len(queries) // self.n_kv_heads, *queries.shape[1:]),
            scale=self.scale,
            n_tokens=n_tokens,
            prompt_tokens=self.prompt_tokens,
            layer=self.layer,
            seed=self.seed,
            values=held.values,
            budget=self.budgets.tolist(),
            since=self.since,
            rope=self.rope,
            protected=self.protected,
        )

    def decide(self, held: Held, queries: np.ndarray, n_tokens: int) -> list[np.ndarray | None]:
        """Score, divide the budget over the KV heads anew where that is due, and choose who stays.

        Parameters as of ``view``, returns as of ``survivors``. Where ``divide`` has come first, nothing is
        scored or divided a second time.
        """
        scores = self._scores or self.divide(held, queries, n_tokens)
        self._scores = None
        return self.survivors(scores, held.positions)

    def divide(self, held: Held, queries: np.ndarray, n_tokens: int) -> list[np.ndarray]:
        """Take the first step of a decision by itself: score, and divide the budget anew where that is due.

        It stands apart because requests on one clock settle the budgets of all heads at a moment before any
        of their layers evicts. The scores wait for ``decide``: a scorer is asked once a compression, since
        it may remember what it was shown.

        Parameters as of ``view``, returns as of ``score``.
        """
        scores = self._scores = self.score(held, queries, n_tokens)
        if self.reallocation_due(n_tokens):
            self.reallocate(scores, n_tokens)
        return scores

    def score(self, held: Held, queries: np.ndarray, n_tokens: int) -> list[np.ndarray]:
        """Score what every KV head holds; parameters as of ``view``.

        Returns
        -------
        list of float32 (n_entries,); protected entries are plus infinity.
        """
        scorer = self.policy.scorer
        self._n_tokens = n_tokens
        queries = queries[:, max(0, queries.shape[1] - self._n_scored(n_tokens)) :]
        layer = self.view(held, queries, n_tokens)
        if scorer.stateful:
            layer = replace(layer, state=self._noted(held.positions))
            self._notes = checked_notes(scorer, layer)
            layer = replace(layer, state=self._notes)
        if held.products is not None:
            layer = layer.with_products(held.products)
        return checked_scores(scorer, layer, self._memory)

    def reallocate(self, scores: Sequence[np.ndarray], n_tokens: int) -> None:
        """Divide the layer's budget over its KV heads by their scores."""
        heads, protected = self.policy.heads, self.n_protected
        request = HeadRequest(scores, self.total, protected, self.layer, self.table)
        budgets, binding = asked_allocator(heads, request)
        self.budgets = checked_budgets(heads.name, budgets, len(scores), self.total, protected)
        self.protection_binding |= binding
        self._last_reallocation = n_tokens

    def survivors(
        self, scores: Sequence[np.ndarray], positions: Sequence[np.ndarray]
    ) -> list[np.ndarray | None]:
        """Choose who stays in every KV head: slots in their new order, or None where nobody goes."""
        lengths = np.array([len(held) for held in positions], np.int64)
        quotas = self._quotas(self._n_tokens)
        allowed = lend_unused(quotas, lengths) if self.policy.redistribute else quotas
        order = self.policy.scorer.slot_order
        self.n_compressions += 1
        self.since = self._n_tokens
        chosen = [
            select_slots(own, held, int(n_kept), order) if len(held) > n_kept else None
            for own, held, n_kept in zip(scores, positions, allowed, strict=True)
        ]
        if self._notes is not None:
            self._notes = [
                own if slots is None else own[slots] for own, slots in zip(self._notes, chosen, strict=True)
            ]
        return chosen

    def forget(self) -> None:
        """Let go of what is known of the entries; none will be scored again."""
        self._notes = self._scores = self._memory = None

    def _n_scored(self, n_tokens: int) -> int:
        scorer = self.policy.scorer
        return min(n_tokens - self.since if scorer.sees_span else scorer.window, n_tokens)

    def _noted(self, positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        noted = [np.zeros(len(held), np.float32) for held in positions]
        for own, before in zip(noted, self._notes or (), strict=False):
            own[: len(before)] = before
        return noted

    def _quotas(self, n_tokens: int) -> np.ndarray:
        """Give how many entries each KV head may keep of its budget; int64 (n_kv_heads,)."""
        budgets = self.budgets.tolist()
        protected = self.n_protected
        granted = {budget: asked_quota(self.policy.scorer, budget, n_tokens) for budget in set(budgets)}
        # What is protected stays, whatever the scorer grants; no budget is smaller.
        return np.array([max(granted[budget], min(budget, protected)) for budget in budgets], np.int64)


def lend_unused(budgets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hand budget that short heads cannot use to the others, in equal shares, the neediest first.

    Parameters
    ----------
    budgets, lengths : int64 (n_kv_heads,)

    Returns
    -------
    int64 (n_kv_heads,), at most ``lengths``, summing to the smaller of both totals.
    """
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
