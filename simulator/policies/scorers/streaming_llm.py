"""StreamingLLM: the first few entries and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
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
    sinks: int = parameter(4, at_least(0), Range(0, 16))

    def score(self, view: CacheView) -> np.ndarray:
        """Score an entry by its position."""
        return view.positions.astype(np.float32)
