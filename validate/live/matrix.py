"""Policies x budgets x problems under real eviction: in parallel, one file per finished batch, resumable."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from transformers.utils import logging

from simulator.budget import Budget
from simulator.cells import code_version
from simulator.policies.language import Policy, parse_policy
from simulator.policies.plugins import failure
from simulator.policies.wave import known_waves
from simulator.results.output import write_parquet
from simulator.results.store import read_table
from simulator.results.tables import GROUP, budget_columns, with_budget_kind
from simulator.workers.processes import processes
from traces.errors import NoDeviceError, UserError
from traces.settings import require_same_settings
from validate.live.completions import ROW_SCHEMA, LiveSettings, baselines_of, complete
from validate.models.load import find_folder, load_model, weights_digest
from validate.models.threads import share_threads
from validate.problems.prompts import read_prompts, require_known_words
from validate.record.recorder import observed_shape

FULL = parse_policy("fullkv")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some problems under one policy and budget; no budget for the full cache."""

    policy: Policy
    budget: Budget | None
    first: int
    count: int

    @property
    def file_name(self) -> str:
        """Give a name that no other batch of the matrix has."""
        budget = "full" if self.budget is None else str(self.budget)
        digest = hashlib.sha256(f"{self.policy.name} {self.policy.parameters_json} {budget}".encode())
        policy = "".join(c if c.isalnum() or c in "-+" else "-" for c in self.policy.name)
        budget = budget.replace("%", "pct").replace("!", "peak")
        return f"{policy}-{budget}-{digest.hexdigest()[:8]}-{self.first:05d}.parquet"

    @property
    def full(self) -> Batch:
        """Give the batch of the same problems with the full cache, which is decoded before it."""
        return Batch(FULL, None, self.first, self.count)

    def path(self, folder: Path) -> Path:
        """Give the file of its rows in a matrix's folder."""
        return folder / "batches" / self.file_name

    def read(self, folder: Path) -> pl.DataFrame:
        """Read its rows: columns of ``completions.ROW_SCHEMA``, and which code took how long.

        Raises
        ------
        UserError
            If the file is damaged, lacks columns, or holds rows of another batch.
        """
        path = self.path(folder)
        required = {name: kind for name, kind in ROW_SCHEMA.items() if name != "budget_kind"}
        rows = with_budget_kind(read_table(path, str(path), required))
        rows = rows.select(*ROW_SCHEMA, pl.exclude(list(ROW_SCHEMA)))
        asked = (self.policy.name, self.policy.parameters_json, *budget_columns(self.budget).values())
        if any(row != asked for row in rows.select(GROUP).unique().iter_rows()):
            raise UserError(f"{path} holds rows of another batch")
        return rows


@dataclass(frozen=True, slots=True)
class MatrixSettings:
    """What all batches of a matrix share; a folder holds results of one of these.

    Attributes
    ----------
    model, dtype, device, revision
        As `load_model`.
    prompts : str
        JSONL file with answers.
    limit : int or None
        Take only the first problems.
    batch : int
        Problems decoded together.
    waves : tuple of str
        Demand profiles beside those that ship with the package.
    live : LiveSettings
    """

    model: str = "reference"
    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    prompts: str = ""
    limit: int | None = None
    batch: int = 128
    waves: tuple[str, ...] = ()
    live: LiveSettings = LiveSettings()  # noqa: RUF009 (frozen)


class Matrix:
    """Batches of one matrix, done and to be done, in a folder.

    Parameters
    ----------
    folder : Path
        Made if it is not there. Each batch is a Parquet file in ``batches/``.
    settings : MatrixSettings
    n_problems : int

    Raises
    ------
    UserError
        If the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: MatrixSettings, n_problems: int) -> None:
        self.folder, self.settings, self.n_problems = folder, settings, n_problems
        # Rows of the files that were found whole, as they were then.
        self._counts: dict[tuple[Path, int, int], int] = {}
        (folder / "batches").mkdir(parents=True, exist_ok=True)
        self._require_same_settings()

    def batches(self, cells: Sequence[tuple[Policy, Budget]]) -> list[Batch]:
        """List all batches: problems outermost, so that a part of the matrix is a smaller matrix."""
        found = []
        for first in range(0, self.n_problems, self.settings.batch):
            count = min(self.settings.batch, self.n_problems - first)
            found.append(Batch(FULL, None, first, count))
            found += [Batch(policy, budget, first, count) for policy, budget in cells if policy.evicts]
        return found

    def is_done(self, batch: Batch) -> bool:
        """Say whether all its rows are there: a limit may have grown since and the last batch with it."""
        path = batch.path(self.folder)
        try:
            status = path.stat()
        except OSError:
            return False
        version = path, status.st_mtime_ns, status.st_size
        if version not in self._counts:
            try:
                self._counts[version] = len(batch.read(self.folder))
            except UserError as error:
                print(f"sim: {error}; it is decoded again", file=sys.stderr)
                path.unlink(missing_ok=True)
                return False
        return self._counts[version] >= self._n_rows(batch)

    def run(
        self, batches: Sequence[Batch], jobs: int, on_batch: Callable[[Batch, str | None], None]
    ) -> dict[Batch, UserError]:
        """Decode every batch that is not done yet, each once its full-cache runs are there.

        Parameters
        ----------
        batches : sequence of Batch
        jobs : int
            Processes; each holds the model.
        on_batch : callable
            Told of every batch that is done, with an error's text if it failed.

        Returns
        -------
        dict, errors by batch; such batches are tried again next time.
        """
        errors: dict[Batch, UserError] = {}
        waiting = []
        for batch in batches:
            if self.is_done(batch):
                on_batch(batch, None)
            else:
                waiting.append(batch)
        if not waiting:
            return errors
        jobs = min(jobs, len(waiting))
        running: dict[Future[None], Batch] = {}
        try:
            with processes(jobs, _start_worker, (self.settings, jobs)) as workers:
                while waiting or running:
                    for batch in list(waiting):
                        if len(running) == 2 * jobs:
                            break
                        if batch.full in errors:
                            # Of the same kind, and told of once.
                            errors[batch] = errors[batch.full]
                            on_batch(batch, f"its full-cache runs failed: {errors[batch]}")
                        elif batch.budget is None or self.is_done(batch.full):
                            running[workers.submit(_run_batch, self.folder, batch)] = batch
                        else:
                            continue
                        waiting.remove(batch)
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        batch = running.pop(future)
                        try:
                            future.result()
                        except UserError as error:
                            errors[batch] = error
                        on_batch(batch, str(errors[batch]) if batch in errors else None)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, for want of memory perhaps; allowed: fewer --jobs or a smaller "
                "--batch. What is done is kept: the same command goes on"
            ) from None
        return errors

    def table(self, batches: Sequence[Batch]) -> pl.DataFrame:
        """Join the rows of all batches that are done."""
        done = [batch for batch in batches if self.is_done(batch)]
        rows = [batch.read(self.folder).head(self._n_rows(batch)) for batch in done]
        return pl.concat(rows) if rows else pl.DataFrame()

    def _n_rows(self, batch: Batch) -> int:
        return batch.count * self.settings.live.samples

    def _require_same_settings(self) -> None:
        asked = asdict(self.settings) | {"prompts_sha256": _digest(Path(self.settings.prompts))}
        # How many problems are taken only adds batches; where the file stands does not matter.
        for name in ("limit", "prompts"):
            del asked[name]
        # What lies behind a name may change.
        folder = find_folder(self.settings.model)
        asked["weights"] = "" if folder is None else weights_digest(folder)
        known_waves(list(self.settings.waves))  # says in words which of them cannot be read
        asked["waves"] = [_digest(Path(wave)) for wave in self.settings.waves]
        require_same_settings(self.folder, asked)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_worker: dict[str, Any] = {}


def _start_worker(settings: MatrixSettings, n_processes: int = 1) -> None:
    """Load the model once per process; processes share the cores."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    share_threads(n_processes)
    try:
        waves = known_waves(list(settings.waves))
        prompts = read_prompts(settings.prompts, settings.limit)
        loaded = load_model(settings.model, settings.dtype, settings.device, settings.revision)
        require_known_words(prompts, loaded.tokenizer, settings.prompts)
        # A model that cannot evict is refused before its first text.
        observed_shape(loaded.model)
        _worker.update(settings=settings.live, waves=waves, prompts=prompts, loaded=loaded)
    except UserError as error:
        # A process that cannot start would take all others with it; each of its batches says why instead.
        _worker["error"] = error


def _run_batch(folder: Path, batch: Batch) -> None:
    """Decode one batch and write its rows."""
    if "error" in _worker:
        raise _worker["error"]
    started = time.perf_counter()
    try:
        rows = complete(
            _worker["loaded"],
            _worker["prompts"][batch.first : batch.first + batch.count],
            batch.policy,
            batch.budget,
            _worker["settings"],
            first=batch.first,
            baselines=None if batch.budget is None else baselines_of(batch.full.read(folder)),
            waves=_worker["waves"],
        )
    except torch.OutOfMemoryError:
        raise NoDeviceError(
            f"{batch.count} problems at once do not fit into the device's memory; allowed: a smaller --batch"
        ) from None
    except UserError:
        raise
    except Exception as error:
        # What a user's part raises fails its own batches only.
        told = failure(batch.policy.parts.values(), error)
        if told is None:
            raise
        raise told from None
    seconds = (time.perf_counter() - started) / max(1, len(rows))
    rows = rows.with_columns(seconds=pl.lit(seconds), code_version=pl.lit(code_version()))
    write_parquet(rows, batch.path(folder))
