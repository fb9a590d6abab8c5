"""Processes that search side by side, and their end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from simulator.search.study import Question, search
from simulator.workers.processes import processes
from traces.errors import UserError

_POLL_SECONDS = 0.5


class WorkerError(UserError):
    """A process that is gone."""

    exit_code = 1


def search_together(
    path: Path,
    question: Question,
    jobs: int,
    deadline: float,
    n_trials: int | None,
    on_moment: Callable[[], None] = lambda: None,
) -> None:
    """Search in ``jobs`` processes; ``on_moment`` is called twice a second, or after every trial.

    Raises UserError if a worker cannot go on.
    """
    if jobs == 1:
        search(path, question, 0, deadline, n_trials, on_moment)
        return
    try:
        with processes(jobs) as workers:
            running = {
                workers.submit(search, path, question, worker, deadline, n_trials) for worker in range(jobs)
            }
            while running:
                done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                on_moment()
    except BrokenProcessPool:
        raise WorkerError(
            "a search process was killed, perhaps for want of memory; run the same command again, with fewer "
            "--jobs: its trials are kept"
        ) from None
