"""Ctrl-C is the main process's business: what it starts does not see it."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

from traces.interrupts import Deferral

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

RAISED_AGAIN_AFTER = 0.05  # seconds; a finalizer lasts far less


@contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C back from this thread and, for good, from the processes that are started meanwhile.

    A process that ignores it only once its own code runs would answer one in its imports with a traceback.
    """
    deferral = Deferral()
    deferral.begin()
    try:
        with _blocked() if hasattr(signal, "pthread_sigmask") else nullcontext():  # not on Windows
            yield
    finally:
        deferral.end()


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # The first process would start it, which before Python 3.12 lets Ctrl-C through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_again(lost: UnraisableHookArgs) -> None:
    """Send the main thread another Ctrl-C where one fell into a finalizer, from which nothing is raised.

    An ``unraisablehook`` of ``sys``: Python would report the first one and go on as if nothing had happened.
    A compiler's finalizers run often enough that a user meets this. All else is reported as always.
    """
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(RAISED_AGAIN_AFTER, _interrupt_main_thread)
    again.daemon = True
    again.start()


def _interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):  # wakes it from a lock, too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()
