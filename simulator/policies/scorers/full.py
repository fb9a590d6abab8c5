"""The full cache: nothing is ever evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class Full(Scorer):
    """Hold every entry, whatever the budget; runs with the trigger that never fires."""

    name: ClassVar[str] = "fullkv"
    source: ClassVar[str] = "reference: nothing is evicted"

    def score(self, view: CacheView) -> np.ndarray:
        """Score all entries alike; no compression ever asks."""
        return np.zeros(view.n_entries, np.float32)
