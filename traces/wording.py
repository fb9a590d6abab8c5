"""Words that messages of all verbs share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def counted(n: int, noun: str) -> str:
    """Write a number of things: ``1 cell``, ``2 cells``, ``1,200 batches``."""
    plural = f"{noun}es" if noun.endswith(("ch", "s")) else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def near(name: str, known: Iterable[str]) -> str:
    """Give ``; did you mean 'rkv'?`` where a name is close to a known one, else nothing."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
