"""``sim sweep``: many traces x policies x budgets, in parallel, resumable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.wording import counted

if TYPE_CHECKING:
    from simulator.sweep.run import Progress


def sweep(
    spec: Annotated[Path, typer.Argument(help="What to replay (TOML): traces, policies, budgets.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; goes before the spec's out.", show_default="spec")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, dask://HOST:PORT, ray or ray://HOST:PORT.")] = "local",
    jobs: Annotated[int, typer.Option(help="Processes of this machine; 0 uses all cores.")] = 0,
    check: Annotated[bool, typer.Option(help="Check checksums and invariants of every trace first.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Replay many cells in parallel; a killed run goes on.

    The file names traces, policies, parameters and budgets, and all of their products are replayed.
    """
    from simulator.workers.blas import use_one_thread

    use_one_thread()
    from simulator.kernels.compiled import tell_compiling

    tell_compiling()
    from simulator.cli.replay import worker_count
    from simulator.engine.sampling import EVERYTHING
    from simulator.policies.wave import tell_unused
    from simulator.results.labels import row_budget
    from simulator.results.metric_names import DEFAULT_METRIC, DEFAULT_OF_SAMPLES
    from simulator.sweep.folder import SweepFolder
    from simulator.sweep.run import plan_sweep, run_sweep, unfinished
    from simulator.sweep.spec import read_spec
    from simulator.workers.engines import parse_engine
    from traces.errors import UserError

    chosen, workers, asked = parse_engine(engine), worker_count(jobs), read_spec(spec)
    if jobs and engine != "local":
        raise UserError(f"--jobs is {jobs}, and --engine {engine} has its own workers; allowed: one of them")
    folder = out or asked.out
    if folder is None:
        raise UserError(f"{spec}: out is missing; allowed: the name of a folder, or --out FOLDER")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out is {folder}, a file; allowed: a folder")
    if dry_run:
        work = plan_sweep(asked)
        n_cells = sum(len(own.cells) for own in work)
        n_left = sum(len(own.cells) for own in unfinished(work, SweepFolder(folder).read_rows()))
        all_of = f"{counted(n_cells, 'cell')} of {counted(len(work), 'trace')}"
        print(f"{all_of}: {n_cells - n_left} done, {n_left} to replay")
        return
    with _shown(quiet) as on_progress:
        progress = run_sweep(asked, folder, engine=chosen, jobs=workers, check=check, on_progress=on_progress)
    if not quiet or progress.n_failed:
        print(f"sim: {_summary(progress)}", file=sys.stderr)
    table = SweepFolder(folder).table() if progress.n_failed or asked.waves else None
    if table is not None:
        tell_unused(asked.waves, table["model"].drop_nulls())
        failed = table.filter(table["status"] != "ok").unique("error", keep="first", maintain_order=True)
        for row in failed.head(10).iter_rows(named=True):
            where = f"{row['trace']}, {row['policy']} at {row_budget(row)}"
            print(f"sim: {where}: {row['error']}", file=sys.stderr)
        if len(failed) > 10:
            print(f"sim: and {len(failed) - 10} other reasons: sim results {folder}", file=sys.stderr)
    if not quiet:
        # A sample tells no worst step.
        metric = DEFAULT_METRIC if asked.sampling == EVERYTHING else DEFAULT_OF_SAMPLES
        print(f"sim: rows are in {folder}: sim results {folder} --metric {metric}", file=sys.stderr)
    if progress.exit_code:
        raise typer.Exit(progress.exit_code)


def _summary(progress: Progress) -> str:
    rate = progress.n_replayed / progress.seconds if progress.seconds else 0.0
    return (
        f"{counted(progress.n_cells, 'cell')}: {progress.n_before} done before, "
        f"{progress.n_replayed} replayed in {progress.seconds:.1f} s ({rate:.1f} cells/s), "
        f"{progress.n_failed} failed"
    )


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar on a terminal: rate, time left, failures."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        *(TextColumn("replaying"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]:.1f} cells/s,"), TimeRemainingColumn()),
        TextColumn("left, {task.fields[failed]} failed"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replaying", total=None, rate=0.0, failed=0)

        def show(progress: Progress) -> None:
            # Cells of earlier runs are left out, which would make the time left look short.
            bar.update(
                task,
                total=progress.n_cells - progress.n_before,
                completed=progress.n_replayed,
                rate=progress.n_replayed / progress.seconds if progress.seconds else 0.0,
                failed=progress.n_failed,
            )

        yield show
