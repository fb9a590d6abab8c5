"""The control by position alone: the newest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policies.scorers.streaming_llm import StreamingLLM


@dataclass(frozen=True)
class Recency(StreamingLLM):
    """Keep the latest entries and, unless ``sinks`` are asked for, nothing else.

    Notes
    -----
    A sliding window: what any score has to beat. With sinks it is StreamingLLM.
    """

    name: ClassVar[str] = "recency"
    source: ClassVar[str] = "control"
    sinks: int = 0
