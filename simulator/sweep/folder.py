"""A sweep's folder: which cells were asked last, and rows in parts that are whole or not there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

from simulator.results.store import parse_table, read_table, sealed_parquet
from simulator.results.tables import GROUP, ROW_SCHEMA, budget_columns, with_budget_kind
from simulator.sweep.grid import TraceCells
from traces.atomic import write_file
from traces.errors import UserError
from traces.lock import locked

PLAN_NAME = "cells.parquet"
ROWS: dict[str, Any] = ROW_SCHEMA | {"seed": pl.Int64, "cell": pl.String}
# What the plan knows of a cell before there is a row.
_LABELS = ("trace_id", "trace", *GROUP, "seed", "cell")
# What rows of any version have.
_NEEDED = {name: ROWS[name] for name in (*_LABELS, "status") if name != "budget_kind"}
_PART = re.compile(r"part-\d{6,}-[0-9a-f]{16}\.parquet")
# More parts than that become one when a sweep is done.
_MANY_PARTS = 64


class OutputError(UserError):
    """Results that cannot be written; those written before stay."""

    exit_code = 1


def is_sweep(path: Path) -> bool:
    """Say whether a sweep was started in a folder."""
    return (path / PLAN_NAME).is_file()


class SweepFolder:
    """Reads and writes a sweep's folder.

    Parameters
    ----------
    path : Path
        ``cells.parquet`` in it lists the cells of the last sweep in their order, ``parts/`` holds rows of
        that and of earlier ones. The name of a part ends with the start of its sha256.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._parts = path, path / "parts"
        self._serial = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, hold it alone, and clear what a killed run left half written.

        Raises UserError if another process holds it, OutputError if it cannot be made.
        """
        with ExitStack() as held:
            with self._told():
                self._parts.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(locked(self.path, wait=False))
                except BlockingIOError:
                    raise UserError(
                        f"{self.path}: another sweep is writing there; "
                        "allowed: one at a time, or another --out"
                    ) from None
            for folder in (self.path, self._parts):
                for stale in folder.glob(".*.part"):
                    stale.unlink(missing_ok=True)
            yield

    def write_plan(self, work: Sequence[TraceCells]) -> None:
        """Say which cells are asked now, in the order of the table; raises OutputError."""
        rows = [
            (
                *(own.trace.trace_id, own.trace.name, cell.policy.name, cell.parameters),
                *budget_columns(cell.budget).values(),
                *(cell.seed, cell.key),
            )
            for own in work
            for cell in own.cells
        ]
        schema = {name: ROWS[name] for name in _LABELS}
        self._write(self.path / PLAN_NAME, sealed_parquet(pl.DataFrame(rows, schema=schema, orient="row")))

    def write_part(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows in one atomic step; raises OutputError."""
        self._write_part(pl.DataFrame(list(rows), schema=ROWS))

    def read_rows(self, *, drop_damaged: bool = False) -> pl.DataFrame:
        """Read the rows of all parts, one for each cell: the last that succeeded, else the last.

        A damaged part is said on standard error and left out, and deleted if ``drop_damaged``.
        """
        frames = [pl.DataFrame(schema=ROWS)]
        for path in self._listed():
            try:
                frames.append(self._read_part(path))
            except UserError as error:
                fate = "is dropped; its cells are replayed again" if drop_damaged else "is left out"
                print(f"sim: {error} and {fate}", file=sys.stderr)
                if drop_damaged:
                    path.unlink()
        # Rows of earlier versions may lack columns.
        rows = pl.concat(frames, how="diagonal_relaxed")
        ordered = rows.sort(pl.col("status") == "ok", maintain_order=True)
        return ordered.unique("cell", keep="last", maintain_order=True)

    def table(self) -> pl.DataFrame:
        """Read the rows of the last sweep, in its order; cells without a row are left out.

        Raises UserError if the list of cells cannot be read.
        """
        plan = self.plan()
        # Under the names that the last sweep knows: a trace may have been moved since.
        rows = self._read_while_others_write().drop("trace")
        return rows.join(plan.select("cell", "trace"), on="cell", maintain_order="right").select(list(ROWS))

    def plan(self) -> pl.DataFrame:
        """Read which cells were asked last, with their labels; raises UserError."""
        path = self.path / PLAN_NAME
        labels = {name: ROWS[name] for name in _LABELS if name != "budget_kind"}
        try:
            return with_budget_kind(read_table(path, str(path), labels)).select(_LABELS)
        except UserError as error:
            raise UserError(f"{error}; run sim sweep again, finished cells are kept") from None

    def _read_part(self, path: Path) -> pl.DataFrame:
        """Read a part that its name vouches for; raises UserError, and FileNotFoundError if it is gone."""
        content = path.read_bytes()
        if sha256(content).hexdigest()[:16] != path.stem.rpartition("-")[2]:
            raise UserError(f"{path} is damaged")
        return with_budget_kind(parse_table(content, ".parquet", str(path), _NEEDED, ROWS, is_whole=True))

    def compact(self) -> None:
        """Join many parts to one; raises OutputError."""
        old = self._listed()
        if len(old) <= _MANY_PARTS:
            return
        # Written before the others go: a run killed between has rows twice, and reads them once.
        self._write_part(self.read_rows())
        for path in old:
            path.unlink()

    def _listed(self) -> list[Path]:
        if not self._parts.is_dir():
            return []
        parts = [path for path in self._parts.iterdir() if _PART.fullmatch(path.name)]
        return sorted(parts, key=_serial)

    def _read_while_others_write(self) -> pl.DataFrame:
        for _ in range(5):
            try:
                return self.read_rows()
            except FileNotFoundError:  # joined to another part since it was listed
                continue
        raise UserError(f"{self.path} changes while it is read; try again")

    def _write_part(self, table: pl.DataFrame) -> None:
        if not self._serial:
            self._serial = max(map(_serial, self._listed()), default=0)
        self._serial += 1
        content = sealed_parquet(table)
        digest = sha256(content).hexdigest()[:16]
        self._write(self._parts / f"part-{self._serial:06d}-{digest}.parquet", content)

    def _write(self, path: Path, content: bytes) -> None:
        # Not synced: a part that a power cut left short does not match its name, and is replayed again.
        with self._told():
            write_file(path, lambda temporary: temporary.write_bytes(content))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None


def _serial(part: Path) -> int:
    return int(part.stem.split("-")[1])
