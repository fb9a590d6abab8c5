"""Open a folder of live results, and decode in it with progress and a word on interrupts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from traces.errors import Interrupted, UserError

if TYPE_CHECKING:
    import polars as pl

    from simulator.budget import Budget
    from simulator.policies.language import Policy
    from validate.live.matrix import Batch, Matrix, MatrixSettings


def open_matrix(settings: MatrixSettings, folder: Path) -> Matrix:
    """Read the problems and open the folder of their results.

    Raises
    ------
    UserError
        If a problem has no answer, answers cannot be graded here, or the folder holds other results.
    """
    from validate.live.matrix import Matrix
    from validate.problems.grading import require_grader
    from validate.problems.prompts import read_prompts, require_answers, tell_limit

    problems = read_prompts(settings.prompts, settings.limit)
    require_answers(problems, settings.prompts)
    tell_limit(len(problems), settings.limit, settings.prompts)
    require_grader(problem.family for problem in problems)
    return Matrix(folder, settings, len(problems))


def run_matrix(
    matrix: Matrix, cells: Sequence[tuple[Policy, Budget]], jobs: int, quiet: bool, title: str = "batches"
) -> tuple[pl.DataFrame, dict[str, UserError]]:
    """Decode what is not done yet; give the rows of all that is, and errors by batch file.

    Raises
    ------
    Interrupted
        Saying what is done.
    UserError
        If nothing could be decoded.
    """
    batches = matrix.batches(cells)
    done = 0
    try:
        with _progress(len(batches), title, quiet) as advance:

            def on_batch(batch: Batch, error: str | None) -> None:
                nonlocal done
                done += error is None
                advance()

            failed = matrix.run(batches, jobs, on_batch)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted with {done} of {len(batches)} batches done: the same command again goes on with "
            "the others"
        ) from None
    rows = matrix.table(batches)
    if rows.is_empty():
        raise next(iter(failed.values()))
    return rows, failed


def n_asked(matrix: Matrix, cells: Sequence[tuple[Policy, Budget]]) -> int:
    """Count the batches that were asked for: the full cache's are, if it is one of the policies."""
    with_full = any(not policy.evicts for policy, _ in cells)
    return sum(batch.budget is not None or with_full for batch in matrix.batches(cells))


def processes(jobs: int, device: str) -> int:
    """Give the number of processes: as asked, else one per core, or one on a GPU.

    Raises
    ------
    UserError
        If fewer than none are asked for.
    """
    if jobs < 0:
        raise UserError(f"--jobs is {jobs}; allowed: 0 (all cores) or more")
    if jobs or device != "cpu":
        return jobs or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(total: int, title: str, quiet: bool) -> Iterator[Callable[[], None]]:
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
