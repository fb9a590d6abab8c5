"""What a paged cache would hold: one block table for all layers and KV heads, as serving engines have it.

Such an engine cannot give one head less than another. Without moving entries it holds every position that any
head retains; if each head's survivors are moved together, it holds for all of them as many blocks as the
longest needs.
"""

from __future__ import annotations

import numpy as np

from traces.errors import UserError

# vLLM's default, and that of sim replay.
BLOCK = 16
_MOST = 2**20


def require_block(block: int) -> None:
    """Refuse a block of no tokens, or of more than any engine has; raises UserError."""
    if not 1 <= block <= _MOST:
        raise UserError(f"--block is {block}; allowed: 1 to {_MOST} tokens")


def union_held(evicted_at: np.ndarray, prompt_tokens: int, n_steps: int) -> np.ndarray:
    """Count the positions that some KV head of some layer holds at every decode step.

    Parameters
    ----------
    evicted_at : int32 (n_layers, n_kv_heads, total_tokens)
        As of ``Outcome``.
    prompt_tokens, n_steps : int

    Returns
    -------
    int64 (n_steps,)
    """
    return _held(evicted_at.max(axis=(0, 1)), prompt_tokens, n_steps)


def blocks_held(evicted_at: np.ndarray, prompt_tokens: int, n_steps: int, block: int) -> np.ndarray:
    """Count the entries in whole blocks that the longest KV head of all layers needs at every decode step.

    Parameters as of `union_held`; ``block`` is in tokens.

    Returns
    -------
    int64 (n_steps,)
    """
    longest = np.zeros(n_steps, np.int64)
    for own in evicted_at.reshape(-1, evicted_at.shape[-1]):
        np.maximum(longest, _held(own, prompt_tokens, n_steps), out=longest)
    return -(-longest // block) * block


def _held(evicted_at: np.ndarray, prompt_tokens: int, n_steps: int) -> np.ndarray:
    """Count what is held at every step of positions evicted at some count of tokens, (total_tokens,)."""
    # The token decoded at step s is position prompt + s; an eviction at that many tokens preceded it.
    now = prompt_tokens + np.arange(n_steps)
    return now + 1 - np.searchsorted(np.sort(evicted_at), now, side="right")
