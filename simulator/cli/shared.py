"""What verbs share: options, how work begins, and how progress looks."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_POLICIES = "fullkv,streamingllm,snapkv,rkv,pyramid-rkv,reasonalloc,random,random-prompt"
DEFAULT_BUDGETS = "10%,20%,30%,50%"

Traces = Annotated[
    list[str], typer.Option("--trace", "-t", help="Trace, folder of traces or glob; repeats. 'sample' ships.")
]
Buffer = Annotated[
    int | None, typer.Option(help="Entries added between compressions, for every policy (default 128).")
]
Waves = Annotated[list[Path] | None, typer.Option("--wave", help="Wave made by sim calibrate; repeats.")]
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


def shows_progress(quiet: bool) -> bool:
    """Tell whether somebody sees it."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def progress(doing: str, total: float | None, quiet: bool) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal while ``doing``.

    Gives what advances it by one of ``total``. Given changes, as rich's ``Progress.update`` takes them, it
    makes these instead; ``told`` is what stands behind the bar.
    """
    if not shows_progress(quiet):
        yield lambda **_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[told]}", markup=False)),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total, told="")
        yield lambda **changes: bar.update(task, **(changes or {"advance": 1}))
