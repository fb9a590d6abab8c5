"""Append-only: an entry is judged once, when it leaves the observation window, and for good."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.policies.ranges import Limit, Range, parameter
from simulator.policies.scorers.accumulated import preferred
from simulator.policies.scorers.window import EvictableWindow
from simulator.policies.view import CacheView, LayerView


@dataclass(frozen=True)
class AppendOnly(EvictableWindow):
    """Admit arrivals by SnapKV's score while there is room, and never evict what was admitted.

    Attributes
    ----------
    rate : float
        Share of all tokens that a head may admit, above 0, at most 1. After ``n_tokens`` a head holds at most
        ``window`` + ``rate`` * ``n_tokens`` entries, rounded up, and never more than its budget.

    Notes
    -----
    An entry counts as admitted once it has survived a compression at which it was no longer protected, that
    is, unless the policy protects more or less, if it stands ``window`` or more before the layer's last
    compression. Entries that were in the window then are judged now, with those that came since: had merely
    passing through the window admitted them, a full budget would fill up with windows and have to evict the
    admitted. So a head whose budget is exhausted keeps its admitted entries and the window, and turns every
    arrival away.

    The admitted score above all others, equal among themselves. Only a budget that shrinks, because layers or
    heads share anew or lent entries are called back (``redistribute``), evicts them, the earliest first.

    References
    ----------
    A control: what is lost if eviction may not look back. The score is that of ``snapkv``.
    """

    name: ClassVar[str] = "append-only"
    source: ClassVar[str] = "control"
    rate: float = parameter(0.25, Limit(lambda rate: 0 < rate <= 1, "above 0, up to 1"), Range(0.05, 1.0))

    def quota(self, budget: int, n_tokens: int) -> int:
        """Let a head hold the window and a share of all tokens, within its budget."""
        return min(budget, self.recent + math.ceil(self.rate * n_tokens))

    def score(self, view: CacheView) -> np.ndarray:
        """Score arrivals by attention, admitted entries above them."""
        return AppendOnly.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Any = None) -> list[np.ndarray]:
        """Score all KV heads at once."""
        pairs = zip(self.importance(layer), layer.positions, strict=True)
        first = layer.since - self.ends(layer).last
        return [preferred(scores, np.flatnonzero(positions < first)) for scores, positions in pairs]
