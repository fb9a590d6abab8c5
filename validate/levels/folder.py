"""A folder of rows, one file per trace: written after every cell, and gone on with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
from traces.settings import require_same_settings
from traces.trace import Trace
from validate.models.load import LoadedModel, dtype_name

_KEY = (*GROUP, "code_version")


def rows_folder(
    path: Path | None, level: str, loaded: LoadedModel, seed: int, waves: Sequence[Path]
) -> RowsFolder | None:
    """Open the folder that ``--out`` names, if it names one.

    Raises
    ------
    UserError
        As `RowsFolder`.
    """
    if path is None:
        return None
    settings = {
        "level": level,
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": dtype_name(loaded.model.dtype),
        "seed": seed,
        "waves": [sha256(read_document(wave, f"wave {wave}", UserError)).hexdigest() for wave in waves],
    }
    return RowsFolder(path, settings)


class RowsFolder:
    """Reads and writes the rows of a level.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    settings : mapping
        What all rows have in common, as JSON can hold it.

    Raises
    ------
    UserError
        If the folder cannot be made or holds rows of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path} cannot be made: {error.strerror}; allowed: a folder") from None
        require_same_settings(path, settings)

    def file(self, trace: Trace) -> Path:
        """Name a trace's file; two traces of one name have two."""
        return self.path / f"{trace.path.stem}-{trace.trace_id[:8]}.parquet"

    def rows(self, trace: Trace) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Read a trace's rows, each by what tells its cell apart; those of other code are left out.

        A damaged file is said on standard error and removed.
        """
        path = self.file(trace)
        if not path.exists():
            return {}
        try:
            found = read_table(path, str(path), NEEDED, ROW_SCHEMA).to_dicts()
        except UserError as error:
            print(f"sim: {error}; its cells are run again", file=sys.stderr)
            path.unlink()
            return {}
        return {_key(row): row for row in found if row["code_version"] == code_version()}

    def write(self, trace: Trace, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows of a trace in one atomic step."""
        write_parquet(pl.DataFrame(rows, infer_schema_length=None), self.file(trace))


def cell_key(labels: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give what tells a cell of a trace apart, from its labels."""
    return _key({**labels, "code_version": code_version()})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)
