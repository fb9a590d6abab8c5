"""CriticalKV: half of the budget by attention, the rest by attention times the size of the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import refuse_unless
from simulator.policies.ranges import Range, Ranges
from simulator.policies.scorers.accumulated import preferred, value_sizes
from simulator.policies.scorers.window import HeldWindow
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class CriticalKV(HeldWindow):
    """Choose in two stages over ``snapkv-paper``.

    Attributes
    ----------
    first_stage_share : float
        Share of the head's budget that goes to the best base scores, rounded down and at least 1; the
        observation window takes the first of these places.
    epsilon : float
        Added to the base score before it is multiplied by the value's norm in the second stage.

    Notes
    -----
    The first stage's entries score above all others, equal among themselves. The published code takes the
    L1 norm of the value after the output projection, mean over the group; a trace holds no output weights, so
    the norm here is of the value itself. The head's budget is the one in force before a head allocator
    divides anew by these scores.

    References
    ----------
    Feng et al. 2025, "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective"
    (arXiv 2502.03805), algorithm 1.
    """

    name: ClassVar[str] = "criticalkv"
    source: ClassVar[str] = "Feng et al. 2025, arXiv 2502.03805"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    searched: ClassVar[Ranges] = {**HeldWindow.searched, "first_stage_share": Range(0.1, 0.9)}
    first_stage_share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range = 0 <= self.first_stage_share <= 1
        refuse_unless(in_range, "first_stage_share", self.first_stage_share, "0 to 1")
        refuse_unless(0 <= self.epsilon < np.inf, "epsilon", self.epsilon, "0 or more")

    def score(self, view: CacheView) -> np.ndarray:
        """Score by attention times value norm, the first stage above all others."""
        base = self.importance(view)
        ranked = np.where(view.positions < view.n_tokens - self.window, base, np.float32(np.inf))
        n_first = max(1, int(self.first_stage_share * view.budget))
        # Pooling makes plateaus: ties go to the later position, as everywhere.
        first = np.lexsort((-view.positions, -ranked))[:n_first]
        return preferred((base + np.float32(self.epsilon)) * value_sizes(view), first)
