"""Which values a parameter of a part may have, and how far a search may turn it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, NamedTuple

_DECLARED = "kvbudget"  # in the metadata of fields


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log`` spreads the draws evenly over magnitudes.

    ``step`` is for whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: int = 1


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: tuple[Any, ...]


Ranges = Mapping[str, Range | Choices]


class Limit(NamedTuple):
    """A test of a value, and the words for the values that pass it."""

    allows: Callable[[Any], bool]
    words: str


def at_least(low: float, *, finite: bool = False) -> Limit:
    """Allow ``low`` and more; with ``finite`` not infinity."""
    return Limit(lambda value: low <= value and not (finite and math.isinf(value)), f"{low} or more")


def between(low: float, high: float) -> Limit:
    """Allow ``low`` to ``high``, both included."""
    return Limit(lambda value: low <= value <= high, f"{low} to {high}")


def one_of(values: Sequence[str]) -> Limit:
    """Allow some words."""
    return Limit(lambda value: value in values, ", ".join(values))


def parameter(default: Any, limit: Limit | None = None, searched: Range | Choices | None = None) -> Any:
    """Declare a parameter of a part: a dataclass field that the part refuses outside of its limit.

    What is ``searched`` joins the part's ranges of that name; without it a search keeps the default.
    """
    return field(default=default, metadata={_DECLARED: (limit, searched)})


def declared(part: type) -> tuple[dict[str, Limit], dict[str, Range | Choices]]:
    """Collect the limits and the searched ranges that a class, not yet a dataclass, declares; by name."""
    own = {
        name: value.metadata[_DECLARED]
        for name, value in vars(part).items()
        if isinstance(value, Field) and _DECLARED in value.metadata
    }
    limits = {name: limit for name, (limit, _) in own.items() if limit is not None}
    return limits, {name: searched for name, (_, searched) in own.items() if searched is not None}
