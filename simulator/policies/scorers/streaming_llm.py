"""StreamingLLM: the first few entries and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer, refuse_unless
from simulator.policies.ranges import Range, Ranges
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Keep ``sinks`` first entries and otherwise the latest.

    Notes
    -----
    Keys keep their original positions; the paper re-indexes positions inside the cache.

    References
    ----------
    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    """

    name: ClassVar[str] = "streamingllm"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    searched: ClassVar[Ranges] = {"sinks": Range(0, 16)}
    sinks: int = 4

    def __post_init__(self) -> None:
        refuse_unless(self.sinks >= 0, "sinks", self.sinks, "0 or more")

    def score(self, view: CacheView) -> np.ndarray:
        """Score an entry by its position."""
        return view.positions.astype(np.float32)
