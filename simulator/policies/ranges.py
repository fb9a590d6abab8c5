"""How far a search may turn a parameter of a part; what a part does not name stays at its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
