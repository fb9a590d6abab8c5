"""Where what is fetched or converted once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Give the folder of one kind of files: in ``$KVBUDGET_CACHE``, ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("KVBUDGET_CACHE")
    if own:
        return Path(own) / kind
    usual = os.environ.get("XDG_CACHE_HOME")
    return (Path(usual) if usual else Path.home() / ".cache") / "kvbudget" / kind
