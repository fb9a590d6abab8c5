"""Where a recording is written, and how it takes the place of what was there before."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from traces.errors import UserError
from traces.manifest import MANIFEST_NAME
from traces.store import SUFFIX

_OWN_FILES = re.compile(r"(layer_\d+|tokens)\.safetensors|manifest\.json\.\w+|.*\.part")


class Target:
    """The place of a trace while it is written: a hidden directory beside it.

    Parameters
    ----------
    path : Path
        The directory the trace will have, ``NAME.kvtrace``.
    overwrite : bool
        Whether a finished trace there may be replaced.

    Raises
    ------
    UserError
        If ``path`` has another suffix, or holds a finished trace or something foreign.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: allowed: a directory named NAME{SUFFIX}")
        self.path = path
        self.staging = path.with_name(f".{path.name}.partial")
        self._replaced = path.with_name(f".{path.name}.replaced")
        if self._replaced.exists() and not path.exists():
            # A kill between the two renames of `publish`: the earlier trace is still whole.
            os.rename(self._replaced, path)
        _check_free(path, overwrite)
        self.discard()
        self.staging.mkdir(parents=True)

    def publish(self, manifest: str) -> None:
        """Write the manifest and move the finished directory to its path."""
        unnamed = self.staging / f"{MANIFEST_NAME}.unfinished"
        with unnamed.open("w", encoding="utf-8") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unnamed, self.staging / MANIFEST_NAME)
        if self.path.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self.path, self._replaced)
        try:
            os.rename(self.staging, self.path)
        except BaseException:
            if self._replaced.exists():
                os.rename(self._replaced, self.path)
            raise
        shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Delete what was written and not published."""
        shutil.rmtree(self.staging, ignore_errors=True)


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"{path}: a file is there; allowed: a new directory NAME{SUFFIX}")
    if (path / MANIFEST_NAME).exists():
        if not overwrite:
            raise UserError(f"{path}: a finished trace is there; allowed: a new path, or overwrite")
        return
    # Without a manifest it may be an unfinished recording, or a directory that is none of ours.
    foreign = [name for name in sorted(os.listdir(path)) if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise UserError(f"{path}: no trace, but holds {foreign[0]!r}; allowed: a new path")
