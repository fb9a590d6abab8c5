"""TOVA: what the last query attends to, all heads of a layer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.policies.attention import held_attention
from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.view import CacheView, LayerView


@dataclass(frozen=True)
class TOVA(Scorer):
    """Keep the tokens that the last query attends to, averaged over all heads of the layer.

    Attributes
    ----------
    recent : int
        Last entries protected. The paper protects none; kvpress protects the newest.

    Notes
    -----
    The score is the mean, over all query heads of the layer, of the last query's softmax weights over what
    is held, so that with equal budgets all KV heads keep the same tokens. Where heads hold different ones
    (unequal budgets), a head that has lost a token counts as zero for it.

    References
    ----------
    Oren et al. 2024, "Transformers are Multi-State RNNs" (arXiv 2401.06104), section 3.2.
    """

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104"
    window: ClassVar[int] = 1  # only the last query
    recent: int = parameter(0, at_least(0), Range(0, 32))

    def score(self, view: CacheView) -> np.ndarray:
        """Score one head's entries as if it were alone in its layer."""
        return TOVA.score_layer(self, LayerView.of([view]))[0]

    def score_layer(self, layer: LayerView, memory: Any = None) -> list[np.ndarray]:
        """Score every position once and give each head the scores of those it holds."""
        by_position = np.zeros(layer.n_tokens)
        for view in layer.heads:
            by_position[view.positions] += held_attention(view)[:, -1].sum(axis=0, dtype=np.float64)
        by_position /= layer.queries.shape[0] * layer.queries.shape[1]
        return [by_position[positions].astype(np.float32) for positions in layer.positions]
