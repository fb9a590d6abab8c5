"""What ``sim validate`` tells: tables, files, the report, and what failed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import indent

import polars as pl
import typer
from rich.console import Console

from simulator.results.labels import told_apart
from simulator.results.layout import plain_console
from simulator.results.metric_names import METRICS
from simulator.results.output import tell_written, write_rows
from simulator.sweep.rows import read_rows
from traces.atomic import write_text
from traces.errors import NoDeviceError, UserError
from validate.live.accuracy import accuracy_table
from validate.live.fidelity import fidelity_table, matched_cells
from validate.live.terminal import print_accuracy, print_fidelity


def read_simulated(path: Path) -> pl.DataFrame:
    """Read rows of a replay.

    Raises
    ------
    UserError
        If the file is no such table.
    """
    try:
        rows = read_rows([path])
    except UserError as error:
        raise UserError(f"--simulated {error}") from None
    if all(rows[name].null_count() for name in METRICS):
        raise UserError(f"--simulated {path} has no number in all of its rows; allowed: {', '.join(METRICS)}")
    models = sorted(set(rows["model"].drop_nulls()))
    if len(models) > 1:
        raise UserError(f"--simulated {path} holds rows of {', '.join(models)}; allowed: one model's")
    return rows


def put_out(
    rows: pl.DataFrame,
    show: Callable[[Console], None],
    output: Path | None,
    chosen: str,
    note: str = "",
    *,
    n_shown: int | None = None,
    quiet: bool = False,
) -> None:
    """Print what a run found, or write it to a file, and say what was written.

    Parameters
    ----------
    rows : polars.DataFrame
    show : callable
        Prints them in a form to be read, ``note`` included.
    output : Path or None
        A file; standard output by default.
    chosen : str
        The format: table, csv, json or parquet.
    note : str
        Lines that have to be seen: they go to standard error where ``show`` does not print them there.
    n_shown : int, optional
        Rows of the form to be read, if these are others.
    quiet : bool
    """
    if chosen != "table":
        write_rows(rows, output, chosen)
    elif output is None:
        show(plain_console(160))
    else:
        text = StringIO()
        show(plain_console(200, text))
        write_text(output, text.getvalue())
    tell_written(output, n_shown if chosen == "table" and n_shown is not None else len(rows), quiet)
    if note and (chosen != "table" or output is not None):
        print(indent(note, "sim: "), file=sys.stderr)


def tell(
    rows: pl.DataFrame,
    out: Path,
    replayed: pl.DataFrame | None,
    report: Path | None,
    chosen: str,
    output: Path | None,
    note: str = "",
    *,
    quiet: bool = False,
) -> None:
    """Put out accuracy and fidelity; write tables into the folder, and the report with its ``note``."""
    labelled, *others = told_apart(rows, *([] if replayed is None else [replayed]))
    accuracy = accuracy_table(labelled)
    write_rows(accuracy, out / "accuracy.csv", "csv")
    put_out(
        rows.drop("token_ids") if chosen == "csv" else rows,
        partial(print_accuracy, accuracy=accuracy, note=note),
        output,
        chosen,
        note,
        n_shown=len(accuracy),
        quiet=quiet,
    )
    cells = fidelity = None
    if replayed is not None:
        cells = matched_cells(others[0], labelled)
        fidelity = fidelity_table(cells)
        write_rows(fidelity, out / "fidelity.csv", "csv")
        if chosen == "table" or output is not None:
            print_fidelity(plain_console(160), fidelity)
    if report is not None:
        # altair is needed for a report alone.
        from validate.live.report import write_report

        n_charts = write_report(report, labelled, accuracy, out, cells, fidelity, note)
        tell_written(report, n_charts, quiet, "chart")


def report_failed(failed: list[UserError], n_asked: int, what: str) -> None:
    """Say each reason once, if there is any, and exit as a replay does.

    That is with 1 where some failed, with the first one's own code where all did, and with 6 where a device
    was too small.
    """
    for text in dict.fromkeys(map(str, failed)):
        print(f"sim: {text}", file=sys.stderr)
    if failed:
        every = len(failed) >= n_asked
        told = f"all {what} failed" if every else f"{len(failed)} {what} failed, the others are written"
        print(f"sim: {told}", file=sys.stderr)
        lacks_device = any(isinstance(error, NoDeviceError) for error in failed)
        raise typer.Exit(NoDeviceError.exit_code if lacks_device else failed[0].exit_code if every else 1)
