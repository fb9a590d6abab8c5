"""The control by position alone: the newest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Range, Ranges
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class Recency(Scorer):
    """Keep the latest entries and, unless ``sinks`` are asked for, nothing else.

    Notes
    -----
    A sliding window: what any score has to beat. With sinks it is StreamingLLM.
    """

    name: ClassVar[str] = "recency"
    source: ClassVar[str] = "control"
    searched: ClassVar[Ranges] = {"sinks": Range(0, 16)}
    sinks: int = 0

    def __post_init__(self) -> None:
        refuse_unless(self.sinks >= 0, "sinks", self.sinks, "0 or more")

    def score(self, view: CacheView) -> np.ndarray:
        """Score an entry by its position."""
        return view.positions.astype(np.float32)
