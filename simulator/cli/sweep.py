"""``sim sweep``: many traces x policies x budgets, in parallel, resumable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import shared
from traces.progress import progress
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
    check: shared.Check = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do.")] = False,
    quiet: shared.Quiet = False,
) -> None:
    """Replay many cells in parallel; a killed run goes on.

    The file names traces, policies, parameters and budgets, and all of their products are replayed.
    """
    shared.prepare_kernels()
    from simulator.engine.sampling import EVERYTHING
    from simulator.policies.wave import tell_unused
    from simulator.results.metric_names import DEFAULT_METRIC, DEFAULT_OF_SAMPLES
    from simulator.sweep.folder import SweepFolder
    from simulator.sweep.run import plan_sweep, run_sweep, unfinished
    from simulator.sweep.spec import read_spec
    from simulator.workers.cores import worker_count
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
    with progress("replaying", None, quiet) as show:
        done = run_sweep(
            asked,
            folder,
            engine=chosen,
            jobs=workers,
            check=check,
            on_progress=lambda now: show(**_bar(now)),
        )
    if not quiet or done.n_failed:
        print(f"sim: {_summary(done)}", file=sys.stderr)
    table = SweepFolder(folder).table() if done.n_failed or asked.waves else None
    if table is not None:
        tell_unused(asked.waves, table["model"].drop_nulls())
        others = shared.tell_failed(table, 10) - 10
        if others > 0:
            print(f"sim: and {others} other reasons: sim results {folder}", file=sys.stderr)
    if not quiet:
        # A sample tells no worst step.
        metric = DEFAULT_METRIC if asked.sampling == EVERYTHING else DEFAULT_OF_SAMPLES
        print(f"sim: rows are in {folder}: sim results {folder} --metric {metric}", file=sys.stderr)
    if done.exit_code:
        raise typer.Exit(done.exit_code)


def _bar(now: Progress) -> dict[str, Any]:
    """Give what a bar shows; cells of earlier runs, left out, would make the time left look short."""
    return {
        "total": now.n_cells - now.n_before,
        "completed": now.n_replayed,
        "told": f"left, {_rate(now):.1f} cells/s, {now.n_failed} failed",
    }


def _rate(now: Progress) -> float:
    return now.n_replayed / now.seconds if now.seconds else 0.0


def _summary(done: Progress) -> str:
    return (
        f"{counted(done.n_cells, 'cell')}: {done.n_before} done before, "
        f"{done.n_replayed} replayed in {done.seconds:.1f} s ({_rate(done):.1f} cells/s), "
        f"{done.n_failed} failed"
    )
