"""A sweep from its file to its folder: what is done stays, what is left is replayed."""

from __future__ import annotations

import errno
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from simulator.cells import code_version
from simulator.policies.wave import Wave, known_waves, require_fitting
from simulator.sweep.folder import OutputError, SweepFolder
from simulator.sweep.grid import TraceCells, find_sweep_traces, lay_out, read_waves, wave_digest
from simulator.sweep.spec import Spec
from simulator.sweep.tasks import Portions, Task
from simulator.sweep.worker import Done, replay_task
from simulator.workers.engines import Engine, connected
from simulator.workers.processes import Workers
from traces.errors import Interrupted
from traces.wording import counted


@dataclass
class Progress:
    """How far a sweep is.

    Of its ``n_cells``, ``n_before`` were finished by earlier runs and ``n_replayed`` in this one, among them
    ``n_failed`` that failed; ``seconds`` count from the first cell that was asked of a worker. ``exit_code``
    is 0, 1 if some cells failed, or the first failure's own code if no cell of the sweep succeeded.
    """

    n_cells: int
    n_before: int
    n_replayed: int = 0
    n_failed: int = 0
    seconds: float = 0.0
    exit_code: int = 0

    @property
    def n_done(self) -> int:
        """Cells with a row that need not be replayed again."""
        return self.n_before + self.n_replayed - self.n_failed


def plan_sweep(spec: Spec) -> list[TraceCells]:
    """Lay out the cells; raises UserError if no trace is found for a pattern, or a wave cannot be read."""
    digests, waves = [wave_digest(path) for path in spec.waves], read_waves(spec.waves)
    traces = find_sweep_traces(spec.traces)
    for trace in traces:
        if trace.shape is not None:
            require_fitting(waves, trace.model, trace.shape)
            spec.sampling.require_fits(trace.name, trace.shape, trace.n_steps)
    return lay_out(traces, spec.settings, digests, spec.sampling)


def unfinished(work: list[TraceCells], rows: pl.DataFrame) -> list[TraceCells]:
    """Keep the cells that have no row of success; those that failed are replayed again."""
    done = set(rows.filter(pl.col("status") == "ok")["cell"])
    return [replace(own, cells=tuple(c for c in own.cells if c.key not in done)) for own in work]


def run_sweep(
    spec: Spec,
    out: Path,
    *,
    engine: Engine | None = None,
    jobs: int = 1,
    check: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Replay what is left of a sweep; rows land in its folder as they come.

    Parameters
    ----------
    spec : Spec
    out : Path
        The folder; ``SweepFolder(out).table()`` reads the rows.
    engine : Engine, optional
        This machine by default.
    jobs : int
        Processes of this machine.
    check : bool
        Check every trace whole before it is replayed.
    on_progress : callable
        Called at the start, and whenever rows have landed.

    Raises
    ------
    UserError
        If the sweep cannot begin, or the workers are lost.
    OutputError
        If rows cannot be written.
    Interrupted
        After Ctrl-C. After any of these, what was done stays done.
    """
    work, waves = plan_sweep(spec), known_waves() | read_waves(spec.waves)
    folder = SweepFolder(out)
    n_cells = sum(len(own.cells) for own in work)
    progress = Progress(n_cells, 0)
    with _resumable(out, progress), folder.opened():
        left = unfinished(work, folder.read_rows(drop_damaged=True))
        progress.n_before = n_cells - sum(len(own.cells) for own in left)
        folder.write_plan(work)
        on_progress(progress)
        if progress.n_before < n_cells:
            with connected(engine or Engine(), jobs) as workers:
                codes = _replay(spec, left, waves, workers, folder, check, progress, on_progress)
            progress.exit_code = 0 if not codes else 1 if progress.n_done else codes[0]
        folder.compact()
    return progress


def _replay(
    spec: Spec,
    left: list[TraceCells],
    waves: dict[str, Wave],
    workers: Workers,
    folder: SweepFolder,
    check: bool,
    progress: Progress,
    on_progress: Callable[[Progress], None],
) -> list[int]:
    """Have all cells replayed; the exit codes of those that failed, in the order they came."""
    portions = Portions(left, workers.n_workers)
    trace_of = {cell.key: own.trace for own in left for cell in own.cells}

    contents = (
        pickle.dumps(Task(own.trace, own.cells, waves, code_version(), check, spec.sampling))
        for own in portions
    )
    codes: list[int] = []
    started = time.perf_counter()
    with closing(workers.run(replay_task, contents)) as results:
        for done in results:
            assert isinstance(done, Done)
            folder.write_part(done.rows)
            portions.learn(trace_of[done.rows[0]["cell"]], len(done.rows), done.seconds)
            failed = [code for code in done.exit_codes if code]
            codes += failed
            progress.n_replayed += len(done.rows)
            progress.n_failed += len(failed)
            progress.seconds = time.perf_counter() - started
            on_progress(progress)
    return codes


@contextmanager
def _resumable(out: Path, progress: Progress) -> Iterator[None]:
    """Say, whatever stops a sweep, what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: run the same command again: {_kept(out, progress)}") from None
    except BrokenProcessPool:
        raise OutputError(
            "a worker process was killed, perhaps for want of memory; run the same command again, with "
            f"fewer --jobs: {_kept(out, progress)}"
        ) from None
    except OutputError as error:
        raise OutputError(f"{error}; {_again(out, progress)}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "a temporary file"
        raise OutputError(f"{where}: {error.strerror}; {_again(out, progress)}") from None


def _again(out: Path, progress: Progress) -> str:
    return f"{_kept(out, progress)}; once that is mended, run the same command again"


def _kept(out: Path, progress: Progress) -> str:
    return f"{progress.n_done} of {counted(progress.n_cells, 'cell')} are done in {out}"
