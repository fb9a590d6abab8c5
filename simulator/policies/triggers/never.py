"""Compress never."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policies.parts import Trigger


@dataclass(frozen=True)
class Never(Trigger):
    """Never compress."""

    name: ClassVar[str] = "never"
    evicts: ClassVar[bool] = False
    prompt: ClassVar[str] = "wait"  # the prompt is left alone too

    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give None."""
        return None
