"""When a layer compresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from simulator.policies.base import Trigger, refuse_unless
from traces.errors import MissingDataError

PROMPT_MODES = ("compress", "wait", "keep")
NEWLINE = "newline"


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
    buffer: int = 128
    prompt: str = "compress"

    def __post_init__(self) -> None:
        refuse_unless(self.buffer >= 1, "buffer", self.buffer, "1 or more")
        refuse_unless(self.prompt in PROMPT_MODES, "prompt", self.prompt, ", ".join(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count at which the buffer is full; an overfull layer waits for one more token."""
        missing = total + n_kv_heads * self.buffer - n_entries
        return n_tokens + max(1, -(-missing // n_kv_heads))

    def most_added(self, n_kv_heads: int) -> int:
        """Give the buffer, and what the token that fills it may add beyond it."""
        return n_kv_heads * self.buffer + n_kv_heads - 1


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
        earliest = first_excess(n_tokens, n_entries, total, n_kv_heads)
        return earliest + (self.offset - earliest) % self.interval

    def most_added(self, n_kv_heads: int) -> int:
        """Give an interval's entries."""
        return n_kv_heads * self.interval


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
    prompt: str = "compress"

    def __post_init__(self) -> None:
        refuse_unless(self.prompt in PROMPT_MODES, "prompt", self.prompt, ", ".join(PROMPT_MODES))

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count at which the layer will hold more than its budget."""
        return first_excess(n_tokens, n_entries, total, n_kv_heads)

    def most_added(self, n_kv_heads: int) -> int:
        """Give a token's entries."""
        return n_kv_heads


@dataclass(frozen=True)
class Segment(Trigger):
    """Compress after a token that ends a segment of the text, if the layer exceeds its budget.

    Attributes
    ----------
    segment : str
        ``newline``: tokens whose text holds a newline. Or token ids joined by ``/``.
    prompt : str
        As for the buffer.

    Notes
    -----
    The compression follows the step in which the token was appended, as in the published R-KV code, whose
    newline tokens are a list of six ids. Between two such tokens nothing bounds what a layer holds. Token
    texts are those of the trace, which knows the ids that occur in it; a trace without a newline is never
    compressed after its prompt.

    References
    ----------
    R-KV code, ``divide_method=newline``.
    """

    name: ClassVar[str] = "segment"
    source: ClassVar[str] = "R-KV code, divide_method=newline"
    segment: str = "newline"
    prompt: str = "compress"

    def __post_init__(self) -> None:
        known = self.segment in ("", NEWLINE) or all(token.isdecimal() for token in self.segment.split("/"))
        refuse_unless(known, "segment", self.segment, "newline, or token ids joined by /")
        refuse_unless(self.prompt in PROMPT_MODES, "prompt", self.prompt, ", ".join(PROMPT_MODES))

    @property
    def reads_text(self) -> bool:
        """Newlines are found by the text of tokens."""
        return self.segment == NEWLINE

    def resolved(self, vocabulary: Mapping[int, str]) -> Segment:
        """Give the trigger with the ids of newline tokens in place of their name; empty if there are none.

        Raises
        ------
        MissingDataError
            If the text of tokens has to be known and is not.
        """
        if self.segment != NEWLINE:
            return self
        if not vocabulary:
            raise MissingDataError(
                "trigger 'segment' waits for newlines, and the trace does not hold the text of its tokens; "
                "allowed: a trace with a vocabulary, or token ids such as segment=198/271"
            )
        ids = sorted(token for token, text in vocabulary.items() if "\n" in text)
        return replace(self, segment="/".join(map(str, ids)))

    def fires_on(self, token_ids: np.ndarray) -> np.ndarray:
        """Say which tokens end a segment.

        Raises
        ------
        MissingDataError
            If newline tokens are waited for and their ids are not known; see ``resolved``.
        """
        if self.segment == NEWLINE:
            raise MissingDataError(
                "trigger 'segment' waits for newlines, and their token ids are not known; allowed: token ids "
                "such as segment=198/271"
            )
        return np.isin(token_ids, [int(token) for token in self.segment.split("/") if token])

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the first token count at which the layer will hold more than its budget."""
        return first_excess(n_tokens, n_entries, total, n_kv_heads)


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


def first_excess(n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int:
    """Give the first token count, after this one, at which a layer will hold more than ``total`` entries."""
    return n_tokens + max(1, (total - n_entries) // n_kv_heads + 1)
