"""Compress at every multiple of a number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policies.parts import PROMPT_MODES, Trigger
from simulator.policies.ranges import at_least, one_of, parameter
from simulator.policies.triggers.excess import first_excess


@dataclass(frozen=True)
class EveryN(Trigger):
    """Compress whenever the sequence length is a multiple of ``interval``, if the layer exceeds its budget.

    Attributes
    ----------
    interval : int
        Tokens between compressions.
    offset : int
        Tokens by which the phase is shifted. The published R-KV code never resets its counter, so later
        sequences of a process run at an offset.
    prompt : str
        As for the buffer.

    Notes
    -----
    The published code fires on the 0-based position divisible by 128, that is one token later than the
    length is; ``offset=1`` reproduces that.
    """

    name: ClassVar[str] = "every-n"
    source: ClassVar[str] = "R-KV code, divide_method=step_length"
    interval: int = parameter(128, at_least(1))
    offset: int = parameter(0, at_least(0))
    prompt: str = parameter("compress", one_of(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the next multiple at which the layer will hold more than its budget."""
        earliest = first_excess(n_tokens, n_entries, total, n_kv_heads)
        return earliest + (self.offset - earliest) % self.interval

    def most_added(self, n_kv_heads: int) -> int:
        """Give an interval's entries."""
        return n_kv_heads * self.interval
