"""CriticalKV: half of the budget by attention, the rest by attention times the size of the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.ranges import Range, at_least, between, parameter
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
    first_stage_share: float = parameter(0.5, between(0, 1), Range(0.1, 0.9))
    epsilon: float = parameter(1e-4, at_least(0, finite=True))

    def score(self, view: CacheView) -> np.ndarray:
        """Score by attention times value norm, the first stage above all others."""
        base = self.importance(view)
        is_scored = view.positions < view.n_tokens - min(self.window, self.ends(view).last)
        ranked = np.where(is_scored, base, np.float32(np.inf))
        n_first = max(1, int(self.first_stage_share * view.budget))
        # Pooling makes plateaus: ties go to the later position, as everywhere.
        first = np.lexsort((-view.positions, -ranked))[:n_first]
        return preferred((base + np.float32(self.epsilon)) * value_sizes(view), first)
