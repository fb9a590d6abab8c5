"""Processes of this machine: how they start, hear nothing of Ctrl-C, and end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from simulator.workers.blas import use_one_thread
from simulator.workers.interrupts import held_back

_WATCH_SECONDS = 1.0
_LEAVE_SECONDS = 5.0
_MOMENT_SECONDS = 0.01


@dataclass(frozen=True)
class Workers:
    """Workers at hand; ``submit`` is called as that of ``concurrent.futures.Executor``."""

    n_workers: int
    submit: Callable[..., Future[Any]]

    def run(self, function: Callable[[Any], Any], contents: Iterable[Any]) -> Generator[Any, None, None]:
        """Call a function on each of many contents; yields what it returns as it comes, in any order."""
        # As many wait as run: nobody waits for work, and most contents are not made before their time. What a
        # single worker has done is given away before it begins anew.
        most = 2 * self.n_workers if self.n_workers > 1 else 1
        running: set[Future[Any]] = set()
        left = iter(contents)
        more = True
        while more or running:
            while more and len(running) < most:
                try:
                    running.add(self.submit(function, next(left)))
                except StopIteration:
                    more = False
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


@contextmanager
def processes(
    n_workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[Workers]:
    """Have processes of this machine, started anew: torch does not survive a fork.

    They are let go at the end, and killed after an error or Ctrl-C. One that dies breaks them all:
    ``concurrent.futures.process.BrokenProcessPool``. Each has NumPy's BLAS in one thread, so that sums are
    cut alike whatever their number, and calls ``initializer`` first.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        n_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(os.getpid(), initializer, initargs),
    )

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with held_back():  # a process may be started
            return pool.submit(function, *arguments)

    try:
        yield Workers(n_workers, submit)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        ended = set(multiprocessing.active_children()) - before
        for process in ended:
            process.kill()
        # The pool's own thread may be the one that learns of an end.
        until = time.monotonic() + _LEAVE_SECONDS
        while any(process.is_alive() for process in ended) and time.monotonic() < until:
            time.sleep(_MOMENT_SECONDS)
        raise


def _start(parent: int, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """Leave Ctrl-C to the parent, and end when that is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_one_thread("openblas")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)
