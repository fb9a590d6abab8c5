"""VaSE: values of a large range stay, the others are drawn by the attention they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.attention import leading_attention
from simulator.policies.parts import Scorer
from simulator.policies.ranges import Limit, Range, at_least, between, parameter
from simulator.policies.scorers.window import average_pool
from simulator.policies.view import CacheView

_ODD = Limit(lambda size: size >= 1 and size % 2 == 1, "an odd number")


@dataclass(frozen=True)
class VaSE(Scorer):
    """Keep the entries of the largest value range, and draw the rest without replacement by their attention.

    Attributes
    ----------
    window : int
        Observed queries; as many recent entries are protected.
    sinks : int
        First positions protected; they count among those of large range.
    large_share : float
        Share of a head's budget that goes to the largest ranges, rounded down.
    kernel_size : int
        Width of the average over neighbouring slots, odd; beyond both ends is zero.
    sampled : bool
        Draw the rest; otherwise those of the most attention stay, as in the paper's ablation.

    Notes
    -----
    A value's range is its largest channel less its smallest. Attention is the softmax of the window's queries
    over the entries outside the window, mean over queries and group. The draw adds Gumbel noise to its
    logarithm, of which the largest are a draw without replacement; it is fixed by seed, layer, head and token
    count. Among the largest ranges the larger stays, should the budget not hold all of them. The published
    code compresses at every 64th token above the budget (``trigger=every-n,interval=64``).

    References
    ----------
    "VaSE" (arXiv 2606.03928); defaults of its code.
    """

    name: ClassVar[str] = "vase"
    source: ClassVar[str] = "arXiv 2606.03928"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    window: int = parameter(64, at_least(1), Range(1, 64, log=True))
    sinks: int = parameter(4, at_least(0), Range(0, 16))
    large_share: float = parameter(0.25, between(0, 1), Range(0.0, 0.9))
    kernel_size: int = parameter(5, _ODD, Range(1, 15, step=2))
    sampled: bool = True

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    def score(self, view: CacheView) -> np.ndarray:
        """Score one head's entries; zero where not scored."""
        scores = np.zeros(view.n_entries, np.float32)
        n = view.n_entries - min(self.window, self.ends(view).last)
        if n < 1:
            return scores
        weights = average_pool(leading_attention(view, n).mean(axis=(0, 1)), self.kernel_size)
        worth = np.log(np.maximum(weights, np.finfo(np.float32).tiny, dtype=np.float64))
        if self.sampled:
            rng = np.random.default_rng([view.seed, view.layer, view.kv_head, view.n_tokens])
            worth += rng.gumbel(size=view.n_entries)[:n]
        assert view.values is not None
        ranges = np.ptp(view.values[:n], axis=-1)
        ranges[view.positions[:n] < self.ends(view).first] = np.inf
        large = np.lexsort((-view.positions[:n], -ranges))[: int(self.large_share * view.budget)]
        # Above all that are drawn, the larger range first.
        worth[large] = worth.max() + np.arange(len(large), 0, -1)
        scores[:n] = worth
        return scores
