"""Compress when a buffer is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import PROMPT_MODES, Counts, Trigger
from simulator.policies.ranges import at_least, one_of, parameter


@dataclass(frozen=True)
class BufferFull(Trigger):
    """Compress when the layer holds its budget plus ``buffer`` entries per KV head.

    Attributes
    ----------
    buffer : int
        Entries per KV head added between two compressions.
    prompt : str
        ``compress`` cuts the prompt to the budget at the end of prefill; ``wait`` leaves it until the
        buffer is full; ``keep`` never evicts of it, so it has to fit into every budget.
    """

    name: ClassVar[str] = "buffer-full"
    source: ClassVar[str] = "R-KV, arXiv 2505.24133, section 3"
    buffer: int = parameter(128, at_least(1))
    prompt: str = parameter("compress", one_of(PROMPT_MODES))

    def next_compression(self, n_tokens: Counts, n_entries: Counts, total: Counts, n_kv_heads: int) -> Counts:
        """Give the token count at which the buffer is full; an overfull layer waits for one more token."""
        missing = total + n_kv_heads * self.buffer - n_entries
        return n_tokens + np.maximum(1, -(-missing // n_kv_heads))

    def most_added(self, n_kv_heads: int) -> int:
        """Give the buffer, and what the token that fills it may add beyond it."""
        return n_kv_heads * self.buffer + n_kv_heads - 1
