"""Rows of results, read back from files and from folders of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from simulator.results.store import read_table
from simulator.results.tables import GROUP, NEEDED, ROW_SCHEMA, require_sound_rows, with_budget_kind
from simulator.sweep.folder import SweepFolder, is_sweep
from traces.errors import UserError


def read_rows(paths: Sequence[Path]) -> pl.DataFrame:
    """Read result rows back from files of ``sim replay -o`` and folders of ``sim sweep``, in any mix.

    Raises UserError if a file is missing, of another kind, or lacks a column, or a folder is none of a sweep.
    """
    frames = []
    for path in paths:
        if path.is_dir():
            if not is_sweep(path):
                raise UserError(
                    f"{path}: no sweep was started there; allowed: a folder of sim sweep, or files"
                )
            frames.append(SweepFolder(path).table())
            continue
        frame = read_table(path, str(path), NEEDED, ROW_SCHEMA)
        require_sound_rows(frame, str(path))
        missing = [name for name in ROW_SCHEMA if name not in frame.columns]
        frames.append(frame.with_columns(pl.lit(None, ROW_SCHEMA[name]).alias(name) for name in missing))
    table = pl.concat(map(with_budget_kind, frames), how="diagonal_relaxed")
    _require_one_sample(table)
    _require_one_level(table)
    # Of many columns the JSON reader loses the order.
    known = [name for name in ROW_SCHEMA if name in table.columns]
    return table.select(*known, pl.exclude(known))


def _require_one_level(table: pl.DataFrame) -> None:
    """Refuse rows of a replay beside those of a level of validation, or of two: they measure other things."""
    if "level" not in table.columns:
        return
    found = [str(level or "replay") for level in table["level"].unique(maintain_order=True)]
    if len(found) > 1:
        raise UserError(f"rows are of several levels: {', '.join(found)}; allowed: files of one level")


def _require_one_sample(table: pl.DataFrame) -> None:
    if "sampling" not in table.columns:
        return
    kinds = table.group_by(*GROUP, "trace_id").agg(pl.col("sampling").n_unique().alias("n"))
    if kinds["n"].max() not in (None, 1):
        found = [str(kind or "everything") for kind in table["sampling"].unique(maintain_order=True)]
        raise UserError(
            f"a cell was measured in more than one way: {'; '.join(found)}; allowed: files of one sample"
        )
