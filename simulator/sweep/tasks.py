"""Cells in portions: what one worker is given at a time, and in which order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.policies.wave import Wave
from simulator.sweep.grid import SweepCell, SweepTrace, TraceCells

# What a kill may cost of each worker's work.
_TASK_SECONDS = 4.0
# Before anything is known of how long cells take.
_FIRST_CELLS = 1
_MOST_CELLS = 64


@dataclass(frozen=True)
class Task:
    """Cells of one trace, and what a worker needs to replay them.

    ``waves`` are demand profiles by model. A worker with another ``code_version`` refuses. ``check`` has the
    trace checked whole before it is replayed; ``sampling`` says how much is measured.
    """

    trace: SweepTrace
    cells: tuple[SweepCell, ...]
    waves: dict[str, Wave]
    code_version: str
    check: bool
    sampling: Sampling = EVERYTHING


class Portions:
    """Deals cells out, a few seconds' worth at a time.

    As many traces are under way as there are workers, and turns go round, so that a worker mostly finds the
    trace prepared that it had before. How long a cell takes is learnt from those that are done, per byte of
    trace.
    """

    def __init__(self, work: Sequence[TraceCells], n_workers: int) -> None:
        self._waiting = deque(own for own in work if own.cells)
        self._left = sum(len(own.cells) for own in work)
        self._n_workers = n_workers
        self._seconds = self._measured = 0.0

    def learn(self, trace: SweepTrace, n_cells: int, seconds: float) -> None:
        """Take note of how long some cells took."""
        # In this order: another thread may divide the two at any time, and should sooner think them slow.
        self._seconds += seconds
        self._measured += n_cells * trace.n_bytes

    def __iter__(self) -> Iterator[TraceCells]:
        turns = deque(self._waiting.popleft() for _ in range(min(self._n_workers, len(self._waiting))))
        while turns:
            own = turns.popleft()
            size = self._size(own.trace, n_open=len(turns) + 1)
            rest = own.cells[size:]
            if rest:
                turns.append(TraceCells(own.trace, rest))
            elif self._waiting:
                turns.append(self._waiting.popleft())
            self._left -= min(size, len(own.cells))
            yield TraceCells(own.trace, own.cells[:size])

    def _size(self, trace: SweepTrace, n_open: int) -> int:
        size = _FIRST_CELLS
        if self._measured:
            each = self._seconds / self._measured * trace.n_bytes
            size = int(min(_MOST_CELLS, _TASK_SECONDS / each if each else _MOST_CELLS))
        if n_open < self._n_workers:
            # Too few traces are left to keep all workers busy: divide what there is.
            size = min(size, ceil(self._left / self._n_workers))
        return max(1, size)
