"""What a scorer may look at: one KV head's cache at one compression step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class CacheView:
    """One KV head of one layer at a compression step. Arrays are read-only; axes end in the entry.

    Attributes
    ----------
    keys : float32 (n_entries, head_dim)
        Keys after RoPE, in slot order.
    positions : int32 (n_entries,)
        Token position of each slot.
    queries : float32 (group_size, n_window, head_dim)
        The last queries of the head's GQA group, as many as the scorer's ``window``, oldest first.
    scale : float
        Attention scale: logits are ``scale * q . k``.
    n_tokens, prompt_tokens : int
        Tokens in the cache's history, and how many of them are the prompt.
    layer, kv_head : int
        Where the head stands in the model.
    seed : int
        For scorers that draw at random.
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

    def __post_init__(self) -> None:
        for name in ("keys", "positions", "queries"):
            read_only = getattr(self, name).view()
            read_only.flags.writeable = False
            object.__setattr__(self, name, read_only)

    @property
    def n_entries(self) -> int:
        """Entries the head holds."""
        return len(self.positions)
