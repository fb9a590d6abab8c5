"""What an evicting cache keeps its entries in: the verbs of the host's back end and of a device's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch


class Heads(NamedTuple):
    """What one layer's attention is given for the tokens of a call, or of several.

    Attributes
    ----------
    query : Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
    key, value : Tensor, shape (n_rows, n_kv_heads, n_new, head_dim)
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class BackEnd(Protocol):
    """What holds a batch's entries in all layers and carries out its plan.

    Attributes
    ----------
    on_device : bool
        Whether the host asks nothing of a device that it could have to wait for: prompts then come in one
        pass, tokens one by one, and neither their ids nor their positions are looked at.
    """

    on_device: bool

    @property
    def n_tokens(self) -> torch.Tensor:
        """Tokens in each row's history; int Tensor (n_rows,)."""

    @property
    def held(self) -> np.ndarray:
        """Entries of each row during the latest attention, over layers and KV heads; int64 (n_rows,)."""

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all entries' memory: keys and values."""

    @property
    def most_together(self) -> int:
        """Tokens per row, at least 1, that can be read at once now.

        Layers whose budgets move between them wait for each other where one is due for a compression.
        """

    def prefill(self, layer: int, heads: Heads, scale: float) -> torch.Tensor:
        """Attend within whole prompts in one layer, and take in what of them is to stay.

        Layers come in order, and the plan has read the prompts. Rows shorter than the longest stand at the
        end of ``heads``; the result has the shape of queries and is zero before them.
        """

    def step(self, layer: int, heads: Heads, token_ids: np.ndarray | None) -> torch.Tensor:
        """Take in new tokens in one layer, attend from each to what is held then, and compress what is due.

        ``token_ids``, int (n_rows, n_new), are given to triggers that wait for certain ones. The result has
        the shape of queries.
        """

    def keep_rows(self, rows: np.ndarray) -> None:
        """Free all other rows."""

    def reset(self) -> None:
        """Forget the text."""
