"""SnapKV as its paper has it, at decode time: a softmax over all that is held, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.scorers.window import HeldWindow
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class PaperSnapKV(HeldWindow):
    """Keep what the last ``window`` queries attend to, out of everything they see.

    Notes
    -----
    Unlike ``snapkv``, R-KV's variant, the softmax runs over all held keys, the window's own included and
    causal there, and the group is reduced by the mean of weights. Defaults are those of the paper's runs; the
    official class defaults to ``kernel_size=5,pool=avg``, kvpress to ``window=64`` with those.

    The official code compresses the prompt only, sums over the window's queries (the mean ranks alike) and
    keeps a cache per query head, each pooled by itself. Here the group's mean is pooled, as kvpress does,
    where the order of averages is immaterial.

    References
    ----------
    Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469),
    section 4.
    """

    name: ClassVar[str] = "snapkv-paper"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"

    def score(self, view: CacheView) -> np.ndarray:
        """Score by pooled attention; zero in the window."""
        return self.importance(view)
