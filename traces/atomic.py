"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a hidden file beside ``path``, then move it there.

    Raises
    ------
    OSError
        If it cannot be written; what was at ``path`` stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, as `write_file` does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
