"""What a user wrote in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traces.errors import UserError


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a file; ``what`` is what messages call it.

    Raises
    ------
    UserError
        If it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: no valid TOML: {error}") from None


def require_known(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a key that means nothing.

    Raises
    ------
    UserError
    """
    for key in table:
        if key not in known:
            raise UserError(f"{what} '{key}' is unknown; allowed: {', '.join(known)}")


def shown(value: Any) -> str:
    """Write a value as a message has it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
