"""When a layer compresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policies.base import Trigger, refuse_unless

PROMPT_MODES = ("compress", "wait")


@dataclass(frozen=True)
class BufferFull(Trigger):
    """Compress when the layer holds its budget plus ``buffer`` entries per KV head.

    Attributes
    ----------
    buffer : int
        Entries per KV head added between two compressions.
    prompt : str
        ``compress`` cuts the prompt to the budget at the end of prefill; ``wait`` leaves it until the
        buffer is full.
    """

    name: ClassVar[str] = "buffer-full"
    source: ClassVar[str] = "R-KV, arXiv 2505.24133, section 3"
    buffer: int = 128
    prompt: str = "compress"

    def __post_init__(self) -> None:
        refuse_unless(self.buffer >= 1, "buffer", self.buffer, "1 or more")
        refuse_unless(self.prompt in PROMPT_MODES, "prompt", self.prompt, ", ".join(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count at which the buffer is full; an overfull layer waits for one more token."""
        missing = total + n_kv_heads * self.buffer - n_entries
        return n_tokens + max(1, -(-missing // n_kv_heads))


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
    interval: int = 128
    offset: int = 0
    prompt: str = "compress"

    def __post_init__(self) -> None:
        refuse_unless(self.interval >= 1, "interval", self.interval, "1 or more")
        refuse_unless(self.offset >= 0, "offset", self.offset, "0 or more")
        refuse_unless(self.prompt in PROMPT_MODES, "prompt", self.prompt, ", ".join(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the next multiple at which the layer will hold more than its budget."""
        earliest = n_tokens + max(1, (total - n_entries) // n_kv_heads + 1)
        return earliest + (self.offset - earliest) % self.interval


@dataclass(frozen=True)
class Never(Trigger):
    """Never compress."""

    name: ClassVar[str] = "never"

    @property
    def prompt(self) -> str:
        """Leave the prompt alone too."""
        return "wait"

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give None."""
        return None
