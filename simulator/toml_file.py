"""Names of a TOML file that mean something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from traces.documents import shown
from traces.errors import UserError


def require_known(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a key that means nothing.

    Raises
    ------
    UserError
    """
    for key in table:
        if key not in known:
            raise UserError(f"{what} {shown(key)} is unknown; allowed: {', '.join(known)}")
