"""Who stays in one layer of one request, and when that is decided: the same for a replay and a real run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.contract import checked_budgets, checked_scores
from simulator.policy import Policy
from simulator.selection import select_slots
from simulator.view import CacheView


class Compressor:
    """A policy at work in one layer of one request. It holds no entries and sees them only when it scores.

    Parameters
    ----------
    policy : Policy
    layer : int
    entries : int
        The layer's budget per KV head.
    n_kv_heads, prompt_tokens : int
    scale : float
        Attention scale.
    seed : int
        For scorers that draw at random.

    Attributes
    ----------
    total : int
        The layer's budget in entries over all KV heads.
    budgets : int64 (n_kv_heads,)
        How it is divided over the heads now.
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
        n_kv_heads: int,
        prompt_tokens: int,
        scale: float,
        seed: int,
    ) -> None:
        self.policy, self.layer, self.prompt_tokens = policy, layer, prompt_tokens
        self.scale, self.seed = scale, seed
        self.total = entries * n_kv_heads
        self.budgets = np.full(n_kv_heads, entries, np.int64)
        self.n_compressions = 0
        self.protection_binding = False
        self._last_reallocation: int | None = None

    def next_compression(self, n_tokens: int, n_entries: int) -> int | None:
        """Give the token count of the next compression if nothing is evicted before, or None for never.

        Parameters
        ----------
        n_tokens, n_entries : int
            Tokens in the history, and entries that the layer holds, now.
        """
        trigger = self.policy.trigger
        is_prefilled = n_tokens == self.prompt_tokens and self.n_compressions == 0
        if is_prefilled and trigger.prompt == "compress" and n_entries > self.total:
            return n_tokens
        return trigger.next_compression(n_tokens, n_entries, self.total, len(self.budgets))

    def reallocation_due(self, n_tokens: int) -> bool:
        """Say whether the heads' budgets are to be divided anew at a compression at ``n_tokens``."""
        delta, last = self.policy.heads.delta, self._last_reallocation
        return delta > 0 and (last is None or n_tokens - last >= delta)

    def score(
        self, keys: Sequence[np.ndarray], positions: Sequence[np.ndarray], queries: np.ndarray, n_tokens: int
    ) -> list[np.ndarray]:
        """Score what every KV head holds.

        Parameters
        ----------
        keys : sequence of float32 (n_entries, head_dim), one per KV head
        positions : sequence of int32 (n_entries,)
        queries : float32 (n_query_heads, min(window, n_tokens), head_dim)
            The last queries, oldest first.
        n_tokens : int

        Returns
        -------
        list of float32 (n_entries,); protected entries are plus infinity.
        """
        n_kv_heads = len(self.budgets)
        grouped = queries.reshape(n_kv_heads, len(queries) // n_kv_heads, *queries.shape[1:])
        return [
            checked_scores(
                self.policy.scorer,
                CacheView(
                    keys=keys[kv_head],
                    positions=positions[kv_head],
                    queries=grouped[kv_head],
                    scale=self.scale,
                    n_tokens=n_tokens,
                    prompt_tokens=self.prompt_tokens,
                    layer=self.layer,
                    kv_head=kv_head,
                    seed=self.seed,
                ),
            )
            for kv_head in range(n_kv_heads)
        ]

    def reallocate(self, scores: Sequence[np.ndarray], n_tokens: int) -> None:
        """Divide the layer's budget over its KV heads by their scores."""
        heads, protected = self.policy.heads, self.policy.protected
        budgets, binding = heads.allocate(scores, self.total, protected)
        self.budgets = checked_budgets(heads.name, budgets, len(scores), self.total, protected)
        self.protection_binding |= binding
        self._last_reallocation = n_tokens

    def survivors(
        self, scores: Sequence[np.ndarray], positions: Sequence[np.ndarray]
    ) -> list[np.ndarray | None]:
        """Choose who stays in every KV head: slots in their new order, or None where nobody goes."""
        lengths = np.array([len(held) for held in positions], np.int64)
        allowed = lend_unused(self.budgets, lengths) if self.policy.redistribute else self.budgets
        order = self.policy.scorer.slot_order
        self.n_compressions += 1
        return [
            select_slots(own, held, int(n_kept), order) if len(held) > n_kept else None
            for own, held, n_kept in zip(scores, positions, allowed, strict=True)
        ]


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
