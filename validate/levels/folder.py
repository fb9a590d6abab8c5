"""A folder of rows, one file per trace: written after every cell, and gone on with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

from simulator.cells import code_version
from simulator.results.output import write_parquet
from simulator.results.store import read_table
from simulator.results.tables import GROUP, NEEDED, ROW_SCHEMA
from traces.documents import read_document
from traces.errors import UserError
from traces.lock import locked
from traces.settings import require_same_settings
from traces.trace import Trace
from validate.models.load import LoadedModel, dtype_name

Key = tuple[Any, ...]
_ROOT = Path(__file__).parents[1]


@cache
def level_version() -> str:
    """Name the code that rows of a level depend on: the replay's, and that of levels, eviction and models."""
    digest = sha256()
    for room in ("levels", "eviction", "models"):
        for path in sorted((_ROOT / room).glob("**/*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return f"{code_version()}.{digest.hexdigest()[:12]}"


def rows_folder(
    path: Path | None, level: str, loaded: LoadedModel, seed: int, waves: Sequence[Path]
) -> RowsFolder | None:
    """Open the folder that ``--out`` names, if it names one.

    Raises
    ------
    UserError
        If it holds rows of other settings.
    """
    if path is None:
        return None
    settings = {
        "level": level,
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": dtype_name(loaded.model.dtype),
        "device": loaded.model.device.type,
        "seed": seed,
        "waves": [sha256(read_document(wave, f"wave {wave}", UserError)).hexdigest() for wave in waves],
    }
    require_same_settings(path, settings)
    return RowsFolder(path)


class RowsFolder:
    """Reads and writes the rows of a level; several processes may do so at once.

    Parameters
    ----------
    path : Path
        An existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, trace: Trace) -> Path:
        """Name a trace's file; two traces of one name have two."""
        return self.path / f"{trace.path.stem}-{trace.trace_id[:8]}.parquet"

    def done(self, trace: Trace) -> dict[Key, dict[str, Any]]:
        """Read the rows of a trace that this code wrote, by what tells their cells apart."""
        rows = self._read(trace)
        return {key: row for key, row in rows.items() if row["code_version"] == level_version()}

    def add(self, trace: Trace, row: Mapping[str, Any]) -> None:
        """Write a row of a trace in one atomic step, in the place of an older one of its cell."""
        with locked(self.path, wait=True):
            rows = self._read(trace) | {cell_key(row): dict(row)}
            write_parquet(pl.DataFrame(list(rows.values()), infer_schema_length=None), self.file(trace))

    def _read(self, trace: Trace) -> dict[Key, dict[str, Any]]:
        path = self.file(trace)
        if not path.exists():
            return {}
        try:
            found = read_table(path, str(path), NEEDED, ROW_SCHEMA).to_dicts()
        except UserError as error:
            print(f"sim: {error}; its cells are run again", file=sys.stderr)
            path.unlink()
            return {}
        return {cell_key(row): row for row in found}


def cell_key(row: Mapping[str, Any]) -> Key:
    """Give what tells a cell of a trace apart, from its row or labels."""
    return tuple(row[name] for name in GROUP)
