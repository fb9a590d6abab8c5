"""Ctrl-C at a moment that bears it."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Deferral:
    """Keeps Ctrl-C from the main thread between ``begin`` and ``end``, which hands it on; calls may nest.

    Other threads never see Ctrl-C, so there both do nothing. Blocking the signal would not do: another thread
    may take it, and Python then raises in the main thread all the same.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handler: Any = None
        self._is_pressed = False

    def begin(self) -> None:
        """Take note of Ctrl-C from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth == 0:
            self._is_pressed = False
            self._handler = signal.signal(signal.SIGINT, self._note)
        self._depth += 1

    def end(self) -> None:
        """Let what handled Ctrl-C before have what came meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if self._depth == 0:
            # None where it was not set from Python, which cannot set it back.
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._handler is None else self._handler)
            if self._is_pressed:
                signal.raise_signal(signal.SIGINT)

    def _note(self, *_: object) -> None:
        self._is_pressed = True
