"""Words that messages of all verbs share."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping


def counted(n: int, noun: str) -> str:
    """Write a number of things: ``1 cell``, ``2 cells``, ``1,200 batches``."""
    plural = f"{noun}es" if noun.endswith(("ch", "s")) else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def near(name: str, known: Iterable[str]) -> str:
    """Give ``; did you mean 'rkv'?`` where a name is close to a known one, else nothing."""
    by_word = {own.casefold(): own for own in known}
    found = difflib.get_close_matches(name.casefold(), list(by_word), 1, cutoff=0.6)
    return f"; did you mean '{by_word[found[0]]}'?" if found else ""


def tell_of_other_models(model_of: Mapping[str, str], at_hand: Iterable[str]) -> None:
    """Say on standard error which files, by name, are of no model at hand, and so change nothing."""
    models = sorted(set(at_hand))
    for name, model in model_of.items():
        if model not in models:
            print(
                f"sim: {name} is of model '{model}' and changes nothing for {', '.join(models)}",
                file=sys.stderr,
            )


def number(value: float | None, digits: int) -> str:
    """Write a number with so many decimals, and ``-`` for one that is not there or not a number."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def span(low: float | None, high: float | None, digits: int) -> str:
    """Write an interval, ``0.25 to 0.75``, and ``-`` for one that is not there."""
    ends = number(low, digits), number(high, digits)
    return "-" if "-" in ends else " to ".join(ends)
