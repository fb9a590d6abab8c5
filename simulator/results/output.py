"""Tables leave here: to standard output, or to a file in one atomic step."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import polars as pl

from simulator.results.layout import plain_console
from simulator.results.store import sealed_parquet
from simulator.results.terminal import print_results
from traces.atomic import write_file, write_text
from traces.errors import UserError
from traces.wording import counted

FORMATS = ("table", "csv", "json", "parquet")
_SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".txt": "table"}


def require_place(path: Path | None, option: str) -> None:
    """Raise UserError, before any work is done, if a file's folder is missing or it is a folder itself."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: folder {path.parent} is missing; allowed: an existing folder")
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder is there; allowed: a file")


def require_places(paths: Mapping[str, Path | None]) -> None:
    """Raise UserError for a file that could not be written, or one for two tables; paths by their options."""
    taken: dict[Path, str] = {}
    for option, path in paths.items():
        require_place(path, option)
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise UserError(f"{other} and {option} are both {path}; allowed: two files")


def require_parquet(paths: Mapping[str, Path | None]) -> None:
    """Raise UserError for the name of a Parquet file that ends otherwise; paths by their options."""
    for option, path in paths.items():
        if path is not None and path.suffix != ".parquet":
            raise UserError(f"{option} {path}: suffix is '{path.suffix}'; allowed: .parquet")


def choose_format(asked: str | None, path: Path | None) -> str:
    """Settle the format: what was asked, else the file's suffix, else a table.

    Raises UserError for an unknown format or suffix, for both if they differ, and for parquet without a file.
    """
    require_place(path, "-o")
    if asked is not None and asked not in FORMATS:
        raise UserError(f"--format is '{asked}'; allowed: {', '.join(FORMATS)}")
    told = None if path is None else _SUFFIXES.get(path.suffix)
    if asked is not None and told not in (None, asked):
        raise UserError(
            f"--format {asked} contradicts -o {path}, which is {told}; allowed: either, or both alike"
        )
    if asked is None and path is not None:
        if path.suffix not in _SUFFIXES:
            raise UserError(f"-o {path}: suffix tells no format; allowed: {', '.join(_SUFFIXES)} or --format")
        return _SUFFIXES[path.suffix]
    if asked == "parquet" and path is None:
        raise UserError("--format parquet is binary and needs a file; allowed: with -o FILE.parquet")
    return asked or "table"


def write_rows(table: pl.DataFrame, path: Path | None, chosen: str) -> None:
    """Write full rows, or for ``table`` the readable summary, to a file or standard output."""
    if path is not None and chosen == "parquet":
        write_parquet(table, path)
        return
    text = StringIO()
    if chosen == "table":
        print_results(table, plain_console(160, None if path is None else text))
    elif chosen == "csv":
        text.write(table.write_csv())
    else:
        text.write("[\n" + ",\n".join(json.dumps(row) for row in table.to_dicts()) + "\n]\n")
    if path is None:
        sys.stdout.write(text.getvalue())
    else:
        write_text(path, text.getvalue())


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Write a table as sealed Parquet; a reader never sees half a file."""
    write_file(path, lambda temporary: temporary.write_bytes(sealed_parquet(table)))


def tell_written(path: Path | None, n: int, quiet: bool = False, what: str = "row") -> None:
    """Say on standard error where how many of ``what`` were written; nothing if that was standard output."""
    if path is not None and not quiet:
        print(f"sim: wrote {path}: {counted(n, what)}", file=sys.stderr)
