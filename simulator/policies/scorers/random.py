"""The controls: eviction at random, by head or of all alike, and with the prompt preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class Random(Scorer):
    """Evict at random per KV head, drawn afresh at every compression.

    Attributes
    ----------
    recent : int
        Last entries never evicted, as many as the other policies protect.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"
    recent: int = parameter(8, at_least(0), Range(0, 32))

    def score(self, view: CacheView) -> np.ndarray:
        """Draw a score per entry, fixed by seed, layer, head and token count."""
        rng = np.random.default_rng([view.seed, view.layer, view.kv_head, view.n_tokens])
        return rng.random(view.n_entries, dtype=np.float32)


@dataclass(frozen=True)
class RandomUnified(Random):
    """Evict at random with one draw for all KV heads of all layers, so that they keep the same positions.

    Notes
    -----
    Drawn afresh at every compression, as ``random``: heads and layers of equal budgets that compress together
    hold the same. The control for what heads with sets of their own find for each other.

    References
    ----------
    The ``random_unified`` control of arXiv 2609.03430.
    """

    name: ClassVar[str] = "random-unified"
    source: ClassVar[str] = "control, arXiv 2609.03430"

    def score(self, view: CacheView) -> np.ndarray:
        """Draw a score per position, fixed by seed and token count."""
        rng = np.random.default_rng([view.seed, view.n_tokens])
        return rng.random(view.n_tokens, dtype=np.float32)[view.positions]


@dataclass(frozen=True)
class RandomPrompt(Random):
    """Keep the prompt before anything else and evict the rest at random.

    Notes
    -----
    Where the prompt alone exceeds the budget, prompt entries are evicted at random too.

    References
    ----------
    The control of arXiv 2609.03430, which reports that it matches the best scorers.
    """

    name: ClassVar[str] = "random-prompt"
    source: ClassVar[str] = "control, arXiv 2609.03430"

    def score(self, view: CacheView) -> np.ndarray:
        """Draw a score per entry and lift every prompt entry above the others."""
        drawn = Random.score(self, view)
        return drawn + (view.positions < view.prompt_tokens).astype(np.float32)
