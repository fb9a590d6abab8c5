"""G-KV: a running score of attention, less the redundancy of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.kernels.duplicates import Redundancy
from simulator.policies.attention import held_attention
from simulator.policies.parts import Scorer
from simulator.policies.ranges import Choices, Range, at_least, between, one_of, parameter
from simulator.policies.scorers.accumulated import noted
from simulator.policies.scorers.rkv import NO_MATCH
from simulator.policies.view import CacheView, LayerView

UPDATES = ("max", "mean", "sum")


@dataclass(frozen=True)
class GKV(Scorer):
    """Keep what was attended to lately or long ago and is not repeated.

    Attributes
    ----------
    window : int
        Observed queries; as many recent entries are protected.
    decay : float
        How much of an entry's score outlives a compression, in [0, 1].
    update : str
        What becomes of an old score and a new one: the larger of the decayed old and the new (``max``), a
        moving average (``mean``), or the decayed old and the new together (``sum``).
    alpha : float
        Weight of attention, in [0, 1]; the rest is redundancy's.
    similarity_threshold : float
        Cosine above which (strictly) one key duplicates another.
    no_match : str
        What a key without duplicate does: ``skip`` spares nothing; ``column0`` spares slot 0, as the
        published code does.

    Notes
    -----
    Attention is the softmax of the window's queries over all that is held, the window's own entries included
    and causal there; the group's largest weight counts, mean over queries, divided by the largest of the
    head's candidates. An entry that was in the window, or not there, at the last compression has no old
    score. Redundancy is R-KV's, divided by its largest too. Defaults are those of the published runs, but for
    ``no_match``; the published code can also compress the prompt with scores of all its queries noted.

    References
    ----------
    "G-KV: Decoding-Time KV Cache Eviction with Global Attention" (arXiv 2512.00504).
    """

    name: ClassVar[str] = "gkv"
    source: ClassVar[str] = "arXiv 2512.00504"
    stateful: ClassVar[bool] = True
    window: int = parameter(16, at_least(1), Range(1, 32, log=True))
    decay: float = parameter(0.8, between(0, 1), Range(0.3, 1.0))
    update: str = parameter("max", one_of(UPDATES), Choices(UPDATES))
    alpha: float = parameter(0.5, between(0, 1), Range(0.01, 1.0, log=True))
    similarity_threshold: float = parameter(0.5, between(-1, 1), Range(0.2, 0.95))
    no_match: str = parameter("skip", one_of(NO_MATCH))

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    def observe(self, view: CacheView) -> np.ndarray:
        """Bring the running score of every candidate up to date; zero where not scored."""
        scores, n = np.zeros(view.n_entries, np.float32), self._n_candidates(view)
        if n < 1:
            return scores
        now = held_attention(view)[..., :n].max(axis=0).mean(axis=0)
        now /= max(now.max(), np.finfo(np.float32).tiny)
        old = np.float32(self.decay) * noted(view)[:n]
        if self.update == "max":
            scores[:n] = np.maximum(old, now)
        elif self.update == "sum":
            scores[:n] = old + now
        else:
            was_scored = view.positions[:n] < view.since - self.ends(view).last
            scores[:n] = np.where(was_scored, old + np.float32(1 - self.decay) * now, now)
        return scores

    def score(self, view: CacheView) -> np.ndarray:
        """Score one head's entries as if it were alone in its layer."""
        return GKV.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Redundancy | None = None) -> Sequence[np.ndarray]:
        """Score all KV heads at once."""
        repeated = (memory or self.new_memory()).shares(layer.keys, layer.positions)
        found = []
        for view, shares in zip(layer.heads, repeated, strict=True):
            scores, n = np.zeros(view.n_entries, np.float32), self._n_candidates(view)
            if n > 0:
                redundancy = shares[:n] / shares[:n].max()
                scores[:n] = self.alpha * noted(view)[:n] - (1 - self.alpha) * redundancy
            found.append(scores)
        return found

    def new_memory(self) -> Any:
        """Give what remembers which entries repeat each other."""
        return Redundancy(self.similarity_threshold, spare_column0=self.no_match == "column0")

    def _n_candidates(self, view: CacheView) -> int:
        return view.n_entries - min(self.window, self.ends(view).last)
