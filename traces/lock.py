"""One process at a time in a folder, by a lock that dies with its holder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder's lock.

    Where the system has no ``flock`` nothing is held.

    Parameters
    ----------
    folder : Path
        An existing folder; a file ``.lock`` stays in it.
    wait : bool
        Wait for another holder.

    Raises
    ------
    BlockingIOError
        If another process holds it and ``wait`` is false.
    """
    with (folder / LOCK_NAME).open("ab") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
