"""What a folder of results was made with: one set of settings, written down beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traces.atomic import write_text
from traces.documents import read_json
from traces.errors import UserError


def require_same_settings(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write down the settings of a folder's results, or hold those that are asked against them.

    Parameters
    ----------
    folder : Path
        It holds them in ``settings.json``.
    asked : mapping
        As JSON can hold them.

    Raises
    ------
    UserError
        If the folder holds results of others, naming the first that differs.
    """
    place = folder / "settings.json"
    if not place.exists():
        write_text(place, json.dumps(asked, indent=1) + "\n")
        return
    wanted = json.loads(json.dumps(asked))
    found = read_json(place, f"{place} is damaged", dict[str, Any])
    for name in sorted(wanted):
        if wanted[name] != found.get(name):
            raise UserError(
                f"{folder} holds results of other settings: its {name} is {found.get(name)!r}, "
                f"asked {wanted[name]!r}; allowed: another folder"
            )
