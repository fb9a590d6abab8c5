"""What a scorer may look at: one KV head's cache at one compression step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.policies.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Dot products of a view's keys with its queries, which are of no meaning for another view.

    Attributes
    ----------
    numbers : float32 (n_entries, n_queries * group_size)
        By query and then member of the group; those with entries of the window itself are of no meaning.
    keys, queries : np.ndarray
        The very arrays that they belong to.
    """

    numbers: np.ndarray
    keys: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class CacheView:
    """One KV head of one layer at a compression step. Arrays are read-only; axes end in the entry.

    Attributes
    ----------
    keys : float32 (n_entries, head_dim)
        Keys after RoPE, in slot order.
    positions : int32 (n_entries,)
        Token position of each slot.
    queries : float32 (group_size, n_queries, head_dim)
        The last queries of the head's GQA group, oldest first: as many as the scorer's ``window``, or all
        since the last compression if it asks for those.
    scale : float
        Attention scale: logits are ``scale * q . k``.
    n_tokens, prompt_tokens : int
        Tokens in the cache's history, and how many of them are the prompt.
    layer, kv_head : int
        Where the head stands in the model.
    seed : int
        For scorers that draw at random.
    values : float32 (n_entries, head_dim), optional
        For scorers that need them.
    state : float32 (n_entries,), optional
        What the scorer noted of each entry at earlier compressions; zero for those that came since.
    budget : int
        Entries that the head may keep, as far as that is settled before scoring.
    since : int
        Tokens in the history at the layer's last compression, 0 before the first: the entries of earlier
        positions have survived one.
    rope : Rope, optional
        For scorers that need it.
    products : Products, optional
        Dot products of keys and queries where a replay has measured them already; only for scorers that ask
        for them by ``reuses_products``, and only until they have scored.
    memo : dict, optional
        Kept for this KV head from one compression to the next: a scorer may leave here what it would
        otherwise compute again, by position. It may make scores come sooner, never other; who shows a scorer
        other keys shows it no memo.
    """

    keys: np.ndarray
    positions: np.ndarray
    queries: np.ndarray
    scale: float
    n_tokens: int
    prompt_tokens: int
    layer: int
    kv_head: int
    seed: int
    values: np.ndarray | None = None
    state: np.ndarray | None = None
    budget: int = 0
    since: int = 0
    rope: Rope | None = None
    products: Products | None = None
    memo: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "positions", "queries", "values", "state"):
            given = getattr(self, name)
            if given is not None and given.flags.writeable:
                read_only = given.view()
                read_only.flags.writeable = False
                object.__setattr__(self, name, read_only)

    @property
    def known_products(self) -> np.ndarray | None:
        """Dot products that belong to these keys and queries, if they are known; see ``Products``."""
        known = self.products
        is_ours = known is not None and known.keys is self.keys and known.queries is self.queries
        return known.numbers if known is not None and is_ours else None

    @property
    def n_entries(self) -> int:
        """Entries the head holds."""
        return len(self.positions)

    @property
    def query_positions(self) -> np.ndarray:
        """Token positions of the queries, int64 (n_queries,)."""
        return np.arange(self.n_tokens - self.queries.shape[1], self.n_tokens)
