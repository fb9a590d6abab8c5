"""What verbs share: options, how work begins, and how failures are told."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.errors import UserError

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

DEFAULT_POLICIES = "fullkv,streamingllm,snapkv,rkv,pyramid-rkv,reasonalloc,random,random-prompt"
DEFAULT_BUDGETS = "10%,20%,30%,50%"

Traces = Annotated[
    list[str], typer.Option("--trace", "-t", help="Trace, folder of traces or glob; repeats. 'sample' ships.")
]
Buffer = Annotated[
    int | None, typer.Option(help="Entries added between compressions, for every policy (default 128).")
]
Waves = Annotated[list[Path] | None, typer.Option("--wave", help="Wave made by sim calibrate; repeats.")]
Calibrations = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="Of predicted divergence: of sim validate calibrate; repeats."),
]
Check = Annotated[bool, typer.Option(help="Check checksums and invariants of every trace first.")]
Format = Annotated[str | None, typer.Option("--format", help="table, csv, json or parquet.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write rows to this file.")]
Threads = Annotated[int, typer.Option("--jobs", help="Threads; 0 uses all cores.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def prepare_kernels() -> None:
    """Keep BLAS to one thread, before NumPy is loaded, and have compiling said."""
    from simulator.workers.blas import use_one_thread

    use_one_thread()
    from simulator.kernels.compiled import tell_compiling

    tell_compiling()


def require_counts(**given: float | None) -> None:
    """Raise UserError for an option, by its name, that is below 1 or beyond all measure."""
    for name, value in given.items():
        if value is not None and not 1 <= value < 2**31:
            allowed = "1 to 2,147,483,647" if value >= 2**31 else "1 or more"
            raise UserError(f"--{name.replace('_', '-')} is {value}; allowed: {allowed}")


def tell_unused(waves: list[Path], calibrations: list[Path], models: Iterable[str]) -> None:
    """Say on standard error which files are of no model at hand, and so change nothing."""
    from simulator.policies import wave
    from simulator.results import calibration

    wave.tell_unused(waves, models)
    calibration.tell_unused(calibrations, models)


def tell_failed(table: pl.DataFrame, most: int | None = None) -> int:
    """Say why cells failed, each reason once and at most so many; give how many there are."""
    from simulator.results.labels import row_budget

    failed = table.filter(table["status"] != "ok").unique("error", keep="first", maintain_order=True)
    for row in failed.head(most or len(failed)).iter_rows(named=True):
        print(f"sim: {row['trace']}, {row['policy']} at {row_budget(row)}: {row['error']}", file=sys.stderr)
    return len(failed)


def number_table(first: str, *numbers: str) -> Table:
    """Make an empty table for a terminal: a column of words, and columns of numbers."""
    from simulator.results.layout import empty_table

    return empty_table((first, *numbers), (first,), collapse_padding=True)
