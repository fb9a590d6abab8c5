"""Open a folder of live results, and decode in it with progress and a word on interrupts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from simulator.budget import Budget
from simulator.policies.language import Policy
from traces.errors import Interrupted, UserError
from traces.progress import progress
from validate.live.matrix import Batch, Matrix, MatrixSettings
from validate.problems.grading import require_grader
from validate.problems.prompts import read_prompts, require_answers, tell_limit


def open_matrix(settings: MatrixSettings, folder: Path) -> Matrix:
    """Read the problems and open the folder of their results.

    Raises
    ------
    UserError
        If a problem has no answer, answers cannot be graded here, or the folder holds other results.
    """
    problems = read_prompts(settings.prompts, settings.limit)
    require_answers(problems, settings.prompts)
    tell_limit(len(problems), settings.limit, settings.prompts)
    require_grader(problem.family for problem in problems)
    return Matrix(folder, settings, len(problems))


def run_matrix(
    matrix: Matrix, cells: Sequence[tuple[Policy, Budget]], jobs: int, quiet: bool, title: str = "batches"
) -> tuple[pl.DataFrame, list[UserError], int]:
    """Decode what is not done yet.

    Returns
    -------
    polars.DataFrame
        Rows of all that is done.
    list of UserError
        Of every batch that failed.
    int
        Batches that were asked for: those of the full cache are, if it is one of the policies.

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
        with progress(title, len(batches), quiet) as advance:

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
    with_full = any(not policy.evicts for policy, _ in cells)
    n_asked = sum(batch.budget is not None or with_full for batch in batches)
    return rows, list(failed.values()), n_asked


def decoding_dtype(asked: str | None, device: str) -> str:
    """Give the type to decode in.

    Tokens equal those of another implementation in float32 only, and a CPU is no slower in it.
    """
    return asked or ("float32" if device == "cpu" else "auto")
