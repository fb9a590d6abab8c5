"""Processes that search side by side, and their end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from simulator.search.study import Question, search
from simulator.workers.blas import use_one_thread
from simulator.workers.interrupts import held_back
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

    Raises
    ------
    UserError
        If a worker cannot go on.
    """
    if jobs == 1:
        search(path, question, 0, deadline, n_trials, on_moment)
        return
    # Read by the workers' NumPy when they start.
    use_one_thread()
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    try:
        for worker in range(jobs):
            ours, theirs = context.Pipe(duplex=False)
            arguments = path, question, worker, deadline, n_trials
            process = context.Process(target=_search, args=(theirs, arguments), daemon=True)
            with held_back():
                process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        while ends:
            for end in wait(ends, timeout=_POLL_SECONDS):
                assert isinstance(end, Connection)
                _take(end)
                ends.remove(end)
            on_moment()
    finally:
        for process in processes:
            process.kill()
            process.join()


def _take(end: Connection) -> None:
    try:
        error = end.recv()
    except EOFError:
        raise WorkerError(
            "a search process was killed, perhaps for want of memory; run the same command again, with fewer "
            "--jobs: its trials are kept"
        ) from None
    if error is not None:
        raise error


def _search(end: Connection, arguments: tuple[Path, Question, int, float, int | None]) -> None:
    # An interrupt is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def on_trial() -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        search(*arguments, on_trial)
        end.send(None)
    except Exception as error:
        # A traceback does not travel.
        error.add_note(traceback.format_exc())
        end.send(error)
