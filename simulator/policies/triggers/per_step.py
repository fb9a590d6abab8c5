"""Compress at every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policies.parts import PROMPT_MODES, Trigger
from simulator.policies.ranges import one_of, parameter
from simulator.policies.triggers.excess import first_excess


@dataclass(frozen=True)
class PerStep(Trigger):
    """Compress whenever a token makes the layer exceed its budget, as caches without a buffer do.

    Attributes
    ----------
    prompt : str
        As for the buffer.

    Notes
    -----
    Where every head is full this is a buffer of one entry per KV head. It scores everything at every token:
    exact for the papers that do so, and slow.
    """

    name: ClassVar[str] = "per-step"
    source: ClassVar[str] = "H2O, arXiv 2306.14048; TOVA, arXiv 2401.06104"
    prompt: str = parameter("compress", one_of(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count at which the layer will hold more than its budget."""
        return first_excess(n_tokens, n_entries, total, n_kv_heads)

    def most_added(self, n_kv_heads: int) -> int:
        """Give a token's entries."""
        return n_kv_heads
