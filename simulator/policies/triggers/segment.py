"""Compress after a token that ends a segment of the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from simulator.policies.parts import PROMPT_MODES, Trigger
from simulator.policies.ranges import Limit, one_of, parameter
from simulator.policies.triggers.excess import first_excess
from traces.errors import MissingDataError

NEWLINE = "newline"
_SEGMENTS = Limit(
    lambda segment: segment in ("", NEWLINE) or all(token.isdecimal() for token in segment.split("/")),
    "newline, or token ids joined by /",
)


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
    segment: str = parameter("newline", _SEGMENTS)
    prompt: str = parameter("compress", one_of(PROMPT_MODES))

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
