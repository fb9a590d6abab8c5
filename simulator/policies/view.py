"""What a scorer may look at: one layer's cache at one compression step, or one KV head of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simulator.policies.protection import Ends
from simulator.policies.rope import Rope

# What the KV heads of a layer have each for themselves, and what is the same for all.
_PER_HEAD = ("keys", "positions", "queries", "values", "state", "budget")
_SHARED = ("scale", "n_tokens", "prompt_tokens", "layer", "seed", "since", "rope", "protected")


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
    protected : Ends, optional
        First positions and last entries that are never evicted; see ``Scorer.ends``.
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
    protected: Ends | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "positions", "queries", "values", "state"):
            given = getattr(self, name)
            if given is not None and given.flags.writeable:
                object.__setattr__(self, name, _read_only(given))

    @property
    def n_entries(self) -> int:
        """Entries the head holds."""
        return len(self.positions)

    @property
    def query_positions(self) -> np.ndarray:
        """Token positions of the queries, int64 (n_queries,)."""
        return np.arange(self.n_tokens - self.queries.shape[1], self.n_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class LayerView:
    """All KV heads of a layer at a compression step. Attributes are those of ``CacheView``.

    Attributes
    ----------
    keys, positions, queries
        One per KV head; queries in one array, float32 (n_kv_heads, group_size, n_queries, head_dim).
    scale, n_tokens, prompt_tokens, layer, seed
        The same for all.
    values, state, budget
        One per KV head, optional.
    since, rope, protected
        The same for all.
    products : sequence of float32 (n_entries, n_queries * group_size), optional
        Dot products of these very keys and queries, by query and then member of the group, where a replay has
        measured them already and the scorer ``reuses_products``; those with the last ``n_queries`` entries
        are of no meaning. A view that ``dataclasses.replace`` makes of this one has none.
    """

    keys: Sequence[np.ndarray]
    positions: Sequence[np.ndarray]
    queries: np.ndarray
    scale: float
    n_tokens: int
    prompt_tokens: int
    layer: int
    seed: int
    values: Sequence[np.ndarray] | None = None
    state: Sequence[np.ndarray] | None = None
    budget: Sequence[int] | None = None
    since: int = 0
    rope: Rope | None = None
    protected: Ends | None = None
    products: Sequence[np.ndarray] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", _read_only(self.queries))
        for name in ("keys", "positions", "values", "state"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, [_read_only(own) for own in given])

    @classmethod
    def of(cls, heads: Sequence[CacheView]) -> LayerView:
        """Put KV heads of one layer, with as many queries each, together: the first becomes KV head 0."""
        first = heads[0]
        each: dict[str, Any] = {
            name: [getattr(head, name) for head in heads]
            for name in _PER_HEAD
            if getattr(first, name) is not None
        }
        each["queries"] = np.stack(each["queries"])
        return cls(**each, **{name: getattr(first, name) for name in _SHARED})

    @property
    def n_kv_heads(self) -> int:
        """KV heads."""
        return len(self.keys)

    @property
    def heads(self) -> list[CacheView]:
        """Every KV head by itself."""
        return [self.head(kv_head) for kv_head in range(self.n_kv_heads)]

    def head(self, kv_head: int) -> CacheView:
        """Give one KV head by itself."""
        # Spelt out, since simple scorers wait for it: a loop over the names takes twice as long.
        return CacheView(
            self.keys[kv_head],
            self.positions[kv_head],
            self.queries[kv_head],
            self.scale,
            self.n_tokens,
            self.prompt_tokens,
            self.layer,
            kv_head,
            self.seed,
            None if self.values is None else self.values[kv_head],
            None if self.state is None else self.state[kv_head],
            0 if self.budget is None else self.budget[kv_head],
            self.since,
            self.rope,
            self.protected,
        )

    def with_products(self, products: Sequence[np.ndarray]) -> LayerView:
        """Give the same view that also shows ``products``."""
        shown = replace(self)
        object.__setattr__(shown, "products", products)
        return shown


def _read_only(array: np.ndarray) -> np.ndarray:
    if not array.flags.writeable:
        return array
    shown = array.view()
    shown.flags.writeable = False
    return shown
