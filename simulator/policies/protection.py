"""What a KV head never evicts, whatever is scored: first positions, the prompt, last entries, both ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from traces.documents import shown

_ALLOWED = "none, or prompt, sinks:N, recent:N, boundary:P% joined by +"
# Of the budget at either end; at half of it nothing is left to choose.
_MOST_BOUNDARY = 50
_MOST_ENTRIES = 10**9


class Ends(NamedTuple):
    """Protected entries of a KV head: those of the ``first`` positions and the ``last`` entries."""

    first: int
    last: int


@dataclass(frozen=True)
class Protection:
    """What is protected; all of it together.

    Attributes
    ----------
    sinks : int
        First positions.
    prompt : bool
        Every position of the prompt.
    recent : int
        Last entries.
    boundary : float
        Percent of the mean budget, rounded down to whole entries, that is protected at either end.

    References
    ----------
    ``prompt+recent:64`` is what random eviction keeps in arXiv 2609.03430; both ends are protected in arXiv
    2605.18053.
    """

    sinks: int = 0
    prompt: bool = False
    recent: int = 0
    boundary: float = 0.0

    def ends(self, prompt_tokens: int, entries: int) -> Ends:
        """Give what is protected of a text with such a prompt under a mean budget in entries per KV head."""
        either = int(self.boundary * entries / 100 + 1e-9)
        return Ends(
            max(self.sinks, either, prompt_tokens if self.prompt else 0),
            max(self.recent, either),
        )

    def __str__(self) -> str:
        named = {
            "sinks:{}": self.sinks,
            "prompt": self.prompt,
            "boundary:{:g}%": self.boundary,
            "recent:{}": self.recent,
        }
        return "+".join(text.format(value) for text, value in named.items() if value) or "none"


def parse_protection(text: str) -> Protection:
    """Read ``prompt+recent:64``; raises ValueError for anything but ``none`` and sums of what there is."""
    found: dict[str, Any] = {}
    for piece in [] if text == "none" else text.split("+"):
        name, _, amount = piece.partition(":")
        if name in found:
            raise ValueError(f"protect is {shown(text)}, with {name} twice; allowed: once")
        found[name] = _amount(text, piece, name, amount)
    return Protection(**found)


def _amount(text: str, piece: str, name: str, amount: str) -> int | float | bool:
    if piece == "prompt":
        return True
    if name in ("sinks", "recent") and re.fullmatch(r"\d{1,10}", amount, re.ASCII):
        if int(amount) <= _MOST_ENTRIES:
            return int(amount)
    elif name == "boundary" and re.fullmatch(r"\d{1,2}(\.\d{1,6})?%", amount, re.ASCII):
        if float(amount[:-1]) < _MOST_BOUNDARY:
            return float(amount[:-1])
        raise ValueError(f"protect is {shown(text)}; allowed: a boundary below {_MOST_BOUNDARY}%")
    raise ValueError(f"protect has {shown(piece)}; allowed: {_ALLOWED}")
