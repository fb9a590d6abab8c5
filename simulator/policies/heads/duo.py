"""Two classes of heads: those that only look nearby, and those that retrieve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide
from simulator.policies.heads.shares import ONCE, equal_shares
from simulator.policies.parts import HeadAllocator, HeadRequest, LayerRequest
from simulator.policies.ranges import Range, between, parameter
from simulator.policies.tables import FollowsHeadTable


@dataclass(frozen=True)
class Duo(FollowsHeadTable, HeadAllocator):
    """Two classes of heads: streaming ones get a small share, and retrieval ones what that frees.

    Attributes
    ----------
    head_table : str
        As for HeadKV; the lower a head's number, the sooner it counts as streaming.
    streaming_share : float
        Share of all KV heads of the model that are streaming. Of equal heads the later are.
    stream_budget : float
        Budget of a streaming head, as a multiple of its layer's equal share, though never below the
        protected entries.

    Notes
    -----
    In the paper streaming heads keep sinks and recent entries alone and retrieval heads keep everything, so
    that the memory follows the length; here both live within one budget, and who stays in a head is the
    scorer's business. The paper trains the number that tells heads apart; here it is the head's measured
    demand, or a file, which may hold the published numbers. A layer whose heads are all of one class divides
    alike.

    References
    ----------
    Xiao et al. 2024, "DuoAttention" (arXiv 2410.10819).
    """

    name: ClassVar[str] = "duo"
    source: ClassVar[str] = "Xiao et al. 2024, arXiv 2410.10819"
    delta: ClassVar[int] = ONCE
    head_table: str = ""
    streaming_share: float = parameter(0.5, between(0, 1), Range(0.1, 0.9))
    stream_budget: float = parameter(0.25, between(0, 1), Range(0.05, 0.9))

    def table(self, request: LayerRequest) -> np.ndarray:
        """Give 1 for retrieval heads and 0 for streaming ones; raises as ``head_numbers``."""
        values = self.head_numbers(request)
        n_streaming = int(np.floor(self.streaming_share * values.size + 0.5))
        ranked = np.lexsort((-np.arange(values.size), values.ravel()))
        is_retrieval = np.ones(values.size)
        is_retrieval[ranked[:n_streaming]] = 0
        return is_retrieval.reshape(values.shape)

    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Divide by the two classes."""
        assert request.table is not None
        is_streaming = request.table == 0
        n_streaming = int(is_streaming.sum())
        if n_streaming in (0, request.n_heads):
            return equal_shares(request.total, request.n_heads), False
        wanted = self.stream_budget * request.total / request.n_heads
        small = max(float(request.protected), wanted)
        large = (request.total - n_streaming * small) / (request.n_heads - n_streaming)
        return divide(np.where(is_streaming, small, large), request.total), small > wanted
