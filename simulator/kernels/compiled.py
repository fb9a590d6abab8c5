"""Numba's compiler with machine code kept on disk, until any of the files changes that it was made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

from traces.interrupts import Deferral

# Functions of these are compiled into those of other files, of which Numba itself looks at one alone: loops
# over tiles of an earlier size would go past the ends of arrays.
_SHARED = tuple(Path(__file__).parent.glob("*.py"))


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when it is first called; options as of ``numba.njit``."""

    def decorate(function: Callable[..., Any]) -> Any:
        made = njit(cache=True, **options)(function)
        # Numba has no public way to say more of what its index on disk depends on.
        made._cache._cache_file._source_stamp = _stamp(function.__code__.co_filename)
        return made

    return decorate


class _Undisturbed(event.Listener):
    """Keeps Ctrl-C from the compiler: LLVM's objects, left half-way, are freed twice and end the process."""

    def __init__(self) -> None:
        self._deferral = Deferral()

    def on_start(self, event: event.Event) -> None:
        """Take note of Ctrl-C until the lock is given back."""
        self._deferral.begin()

    def on_end(self, event: event.Event) -> None:
        """Hand Ctrl-C on."""
        self._deferral.end()


event.register("numba:compiler_lock", _Undisturbed())


class _Told(event.Listener):
    """Says once that something is compiled, which a first run on a machine waits for."""

    def __init__(self) -> None:
        self._is_told = False

    def on_start(self, event: event.Event) -> None:
        """Say it when the first function is compiled rather than read from disk."""
        if not self._is_told and sys.stderr.isatty():
            self._is_told = True
            print("sim: compiling for this machine, once: some 20 seconds", file=sys.stderr, flush=True)

    def on_end(self, event: event.Event) -> None:
        """Say nothing."""


@cache
def tell_compiling() -> None:
    """Let this process say on a terminal, once, when it has to compile."""
    event.register("numba:compile", _Told())


@cache
def _stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Tell the state of a file and of those whose functions it may use."""
    own = {Path(path), *_SHARED}
    states = ((found.name, found.stat()) for found in sorted(own) if found.exists())
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)
