"""Prompts that come in one pass or in several, padded on the left."""

from __future__ import annotations

import numpy as np
import torch

from traces.errors import UserError
from validate.models.causal import causal_attention


def prompt_lengths(mask: torch.Tensor | None, n_rows: int, length: int) -> np.ndarray:
    """Count each row's tokens, which have to stand at the end; int64 (n_rows,)."""
    if mask is None:
        return np.full(n_rows, length)
    seen = mask[:, -length:].bool().cpu().numpy()
    prompts = seen.sum(1)
    if (seen != (np.arange(length) >= length - prompts[:, None])).any() or not prompts.all():
        raise UserError("the attention mask is not padding before each prompt; allowed: left padding")
    return prompts


def padding_of(mask: torch.Tensor | None, n_rows: int, length: int) -> np.ndarray:
    """Count what stands before the tokens of each row, of which there may be none yet; int64 (n_rows,)."""
    if mask is None:
        return np.zeros(n_rows, np.int64)
    return length - mask[:, -length:].bool().sum(1).cpu().numpy()


def attend_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: np.ndarray, scale: float
) -> torch.Tensor:
    """Attend causally within each prompt, from its latest tokens to all that have come.

    Parameters
    ----------
    query : Tensor, shape (n_rows, n_query_heads, n_new, head_dim)
    key, value : Tensor, shape (n_rows, n_kv_heads, length, head_dim)
    padding : int64 (n_rows,)
        Columns before each prompt.
    scale : float

    Returns
    -------
    Tensor, shape (n_rows, n_query_heads, n_new, head_dim); zero where a row has no token.
    """
    length, n_new = key.shape[2], query.shape[2]
    output = torch.zeros_like(query)
    for row, first in enumerate(padding.tolist()):
        if (n := min(n_new, length - first)) > 0:
            heads = query[row, :, -n:], key[row, :, first:], value[row, :, first:]
            output[row, :, -n:], _ = causal_attention(*heads, scale)
    return output
