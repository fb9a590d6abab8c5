"""What triggers share: the modes of the prompt, and when a layer exceeds its budget."""

from __future__ import annotations

PROMPT_MODES = ("compress", "wait", "keep")


def first_excess(n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int:
    """Give the first token count, after this one, at which a layer will hold more than ``total`` entries."""
    return n_tokens + max(1, (total - n_entries) // n_kv_heads + 1)
