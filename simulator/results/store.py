"""Tables in files: written with a seal, read back and held against the columns they should have.

The seal is the sha256 of a Parquet file in its own footer, over the file with 64 zeros in its place. Any
reader of Parquet passes it over. It is here because no reader tells a damaged number from a sound one, and
polars may end the whole process at a damaged length.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from traces.documents import convert, parse_json, read_document
from traces.errors import UserError

FORMATS = (".parquet", ".csv", ".json")
_MOST_BYTES = 2**31
Bytes = bytes | memoryview | mmap.mmap
_SEAL, _KIND = "kvbudget.seal", "sha256:"
_BLANK = "0" * 64
# In the footer: the name, then the type and length of the text (Thrift), then the text.
_SEAL_NAME = re.compile(re.escape(_SEAL.encode("ascii")))
_SEAL_DIGITS = re.compile(
    rb"\x18" + bytes([len(_KIND + _BLANK)]) + _KIND.encode("ascii") + rb"([0-9a-f]{64})"
)
_READ_ALONE = "import sys, polars; polars.read_parquet(sys.stdin.buffer.read())"


def sealed_parquet(table: pl.DataFrame) -> bytes:
    """Return a table as a Parquet file with its seal."""
    buffer = BytesIO()
    table.write_parquet(buffer, metadata={_SEAL: _KIND + _BLANK})
    with buffer.getbuffer() as content:
        place = _seal_place(content)
        assert place is not None
        start, stop = place
        content[start:stop] = _digest(content, start, stop).encode("ascii")
    return buffer.getvalue()


def read_table(
    path: Path,
    what: str,
    required: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    *,
    error: type[UserError] = UserError,
) -> pl.DataFrame:
    """Read a table whose format its suffix tells.

    Parameters
    ----------
    path : Path
    what : str
        What messages call it.
    required, optional : mapping of str to polars type
        Columns that have to be there, and those that may be, each of that type or of one that converts
        without loss; any other column is kept as it is.
    error : type of UserError
        What is raised.

    Raises
    ------
    UserError
        As ``error``, if the file cannot be read, is of another format, or a column is missing or of another
        type.
    """
    if not path.exists():
        raise error(f"{what}: cannot be read: No such file or directory")
    if path.suffix not in FORMATS:
        raise error(f"{what}: suffix is '{path.suffix}'; allowed: {', '.join(FORMATS)}")
    return parse_table(
        read_document(path, what, error, _MOST_BYTES), path.suffix, what, required, optional, error
    )


def parse_table(
    content: bytes,
    suffix: str,
    what: str,
    required: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    error: type[UserError] = UserError,
    *,
    is_whole: bool = False,
) -> pl.DataFrame:
    """Read a table from what a file holds; parameters and errors as in `read_table`.

    ``is_whole`` says that the caller knows the content to be what was written, so that no seal is asked for.
    """
    try:
        if suffix == ".parquet":
            if not is_whole:
                _require_whole(content, what)
            table = pl.read_parquet(BytesIO(content))
        elif suffix == ".csv":
            content.decode("utf-8-sig")
            table = pl.read_csv(BytesIO(content), infer_schema_length=None)
        else:
            rows = parse_json(content, what, list[dict[str, Any]], error)
            # Polars would make text of a number in a column of text.
            convert(rows, what, list[_row_type(required, optional)], error)  # type: ignore[misc]
            table = pl.from_dicts(rows, infer_schema_length=None)
    except (pl.exceptions.PolarsError, ValueError, TypeError):
        raise error(f"{what} is damaged or no {suffix[1:]} file") from None
    return checked(table, what, required, optional, error)


def parse_foreign_parquet(content: bytes) -> pl.DataFrame:
    """Read a Parquet file of another program, which has no seal; raises ValueError if it cannot be read."""
    _require_readable(content)
    return pl.read_parquet(BytesIO(content))


def scan_table(path: Path, what: str, required: Mapping[str, Any]) -> pl.LazyFrame:
    """Open a Parquet file of which only some rows are wanted, and which may be larger than the memory.

    Parameters and errors as in `read_table`.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _require_whole(content, what)
        scanned = pl.scan_parquet(path)
        columns = scanned.collect_schema()
    except OSError as failed:
        raise UserError(f"{what}: cannot be read: {failed.strerror}") from None
    except (pl.exceptions.PolarsError, ValueError):
        raise UserError(f"{what} is damaged or no Parquet file") from None
    checked(pl.DataFrame(schema=columns), what, required)
    for name, kind in required.items():
        if columns[name] != kind:
            raise UserError(f"{what}: column '{name}' is {columns[name]}; allowed: {kind}")
    return scanned


def checked(
    table: pl.DataFrame,
    what: str,
    required: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    error: type[UserError] = UserError,
) -> pl.DataFrame:
    """Hold a table against its columns; parameters and errors as in `read_table`."""
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise error(f"{what} has no column '{missing[0]}'; allowed: {', '.join(required)}")
    known = {**required, **(optional or {})}
    for name in table.columns:
        if name in known and table.schema[name] != known[name]:
            table = table.with_columns(_converted(table[name], known[name], what, error))
    return table


def _seal_place(content: Bytes) -> tuple[int, int] | None:
    """Return where the digits of a seal stand, None if there is none; raises ValueError for half of one."""
    footer = max(0, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    name, digits = _SEAL_NAME.search(content, footer), _SEAL_DIGITS.search(content, footer)
    if name is None and digits is None:
        return None
    if name is None or digits is None or name.end() != digits.start():
        raise ValueError("half of a seal")
    return digits.span(1)


def _digest(content: Bytes, start: int, stop: int) -> str:
    whole = memoryview(content)
    digest = hashlib.sha256(whole[:start])
    digest.update(_BLANK.encode("ascii"))
    digest.update(whole[stop:])
    return digest.hexdigest()


def _require_whole(content: bytes | mmap.mmap, what: str) -> None:
    """Refuse a file that differs from its seal, or that has none and cannot be read; raises ValueError."""
    place = _seal_place(content)
    if place is not None:
        if _digest(content, *place) != content[slice(*place)].decode("ascii"):
            raise ValueError("not what was sealed")
        return
    _require_readable(content)
    print(f"sim: {what} has no checksum of sim's; whether it is whole cannot be told", file=sys.stderr)


def _require_readable(content: bytes | mmap.mmap) -> None:
    # By a process of its own, since the reader may end the one it runs in.
    command = [sys.executable, "-c", _READ_ALONE]
    if subprocess.run(command, input=content, capture_output=True, check=False).returncode:
        raise ValueError("it cannot be read")


def _row_type(required: Mapping[str, Any], optional: Mapping[str, Any] | None) -> type:
    """Give the type of one row as JSON has it; what is not known is not looked at."""
    kinds = {pl.String: str, pl.Boolean: bool, pl.Float64: float, pl.Float32: float}
    columns = {**required, **(optional or {})}
    return msgspec.defstruct(
        "Row", [(name, kinds.get(kind, int) | None, None) for name, kind in columns.items()]
    )


def _converted(column: pl.Series, wanted: Any, what: str, error: type[UserError]) -> pl.Series:
    # A column that is empty throughout has no type of its own in a text file, and one of whole numbers none
    # but that of integers.
    may = (
        column.null_count() == len(column)
        or (column.dtype.is_integer() and wanted in (pl.Float64, pl.Float32))
        or (column.dtype.is_integer() and wanted.is_integer())
        or (column.dtype == pl.Float32 and wanted == pl.Float64)
    )
    try:
        if may:
            return column.cast(wanted)
    except pl.exceptions.PolarsError:
        pass
    raise error(f"{what}: column '{column.name}' is {column.dtype}; allowed: {wanted}")
