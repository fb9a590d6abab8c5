"""The control by position alone: the newest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
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
    sinks: int = parameter(0, at_least(0), Range(0, 16))

    def score(self, view: CacheView) -> np.ndarray:
        """Score an entry by its position."""
        return view.positions.astype(np.float32)
