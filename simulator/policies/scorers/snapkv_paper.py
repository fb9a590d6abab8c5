"""SnapKV as its paper has it, at decode time: a softmax over all that is held, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels.attention import max_pool
from simulator.policies.attention import held_attention
from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Choices, Range, Ranges
from simulator.policies.scorers.snapkv import SLOT_ORDERS
from simulator.policies.view import CacheView

POOLS = ("max", "avg")


@dataclass(frozen=True)
class PaperSnapKV(Scorer):
    """Keep what the last ``window`` queries attend to, out of everything they see.

    Attributes
    ----------
    window : int
        Observed queries; as many recent entries are protected.
    kernel_size : int
        Width of the pooling over neighbouring slots outside the window, odd.
    pool : str
        ``max``, cut at both ends, or ``avg``, which pads with zeros and always divides by ``kernel_size``,
        so that the first and last candidates lose.
    slot_order : str
        ``score`` lays survivors out as the published code does, so that pooling meets other neighbours from
        the second compression on.

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
    searched: ClassVar[Ranges] = {
        "window": Range(1, 32, log=True),
        "kernel_size": Range(1, 15, step=2),
        "pool": Choices(("max", "avg")),
    }
    window: int = 32
    kernel_size: int = 7
    pool: str = "max"
    slot_order: str = "chronological"

    def __post_init__(self) -> None:
        refuse_unless(self.window >= 1, "window", self.window, "1 or more")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        refuse_unless(odd, "kernel_size", self.kernel_size, "an odd number")
        refuse_unless(self.pool in POOLS, "pool", self.pool, ", ".join(POOLS))
        known = self.slot_order in SLOT_ORDERS
        refuse_unless(known, "slot_order", self.slot_order, ", ".join(SLOT_ORDERS))

    @property
    def recent(self) -> int:
        """Entries of the observation window, which are not scored."""
        return self.window

    def score(self, view: CacheView) -> np.ndarray:
        """Score by pooled attention; zero in the window."""
        scores = np.zeros(view.n_entries, np.float32)
        n_candidates = view.n_entries - self.window
        if n_candidates > 0:
            weights = held_attention(view)[..., :n_candidates].mean(axis=0).mean(axis=0)
            pooled = scores[:n_candidates]
            if self.pool == "max":
                max_pool(weights, self.kernel_size, pooled)
            else:
                pooled[:] = average_pool(weights, self.kernel_size)
        return scores


def average_pool(values: np.ndarray, kernel_size: int) -> np.ndarray:
    """Average over ``kernel_size`` neighbours, zeros beyond both ends; float32 (n,)."""
    padded = np.pad(values, kernel_size // 2)
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, kernel_size)  # (n, kernel_size)
    # In double precision, so that neighbours in another order give the same average.
    return (neighbours.sum(axis=-1, dtype=np.float64) / kernel_size).astype(np.float32)
