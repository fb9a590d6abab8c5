"""What runs in a worker: one task to rows. A failing trace or cell becomes rows that say so."""

from __future__ import annotations

import pickle
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from simulator.cells import PreparedTrace, code_version
from simulator.engine.sampling import EVERYTHING
from simulator.results.tables import budget_columns
from simulator.sweep.grid import SweepCell
from simulator.sweep.tasks import Task
from traces.check import check_trace
from traces.errors import TraceError, UserError
from traces.remote import fetch, is_remote
from traces.store import open_trace

# Traces whose full cache stays measured in this process, by source and id: the one before may come again.
_N_PREPARED = 2
_prepared: OrderedDict[tuple[Any, ...], PreparedTrace] = OrderedDict()
_preparing = Lock()  # a Dask worker runs several tasks in threads


@dataclass(frozen=True)
class Done:
    """The result of a task: a row and an exit code (0 if it succeeded) per cell, and how long all took."""

    rows: list[dict[str, Any]]
    exit_codes: list[int]
    seconds: float


def replay_task(content: bytes) -> Done:
    """Replay the cells of a pickled task.

    Pickled by the asker itself: every engine hands bytes over as they are, and policies of users' files
    bring their code along.
    """
    started = time.perf_counter()
    task: Task = pickle.loads(content)
    try:
        if code_version() != task.code_version:
            raise UserError(f"the worker runs code {code_version()}; the sweep needs {task.code_version}")
        if task.trace.error is not None:
            raise task.trace.error
        seeds = dict.fromkeys(_sampled_by(task, cell) for cell in task.cells)
        prepared = {seed: _prepare(task, seed) for seed in seeds}
        with next(iter(prepared.values())).trace.mapped():
            results = [_replayed(task, cell, prepared[_sampled_by(task, cell)]) for cell in task.cells]
    except Exception as error:
        results = [_failed(task, cell, error) for cell in task.cells]
    rows = [
        row | {"cell": cell.key, "seed": cell.seed, "trace": task.trace.name}
        for cell, (row, _) in zip(task.cells, results, strict=True)
    ]
    return Done(rows, [code for _, code in results], time.perf_counter() - started)


def _sampled_by(task: Task, cell: SweepCell) -> int:
    """Give the seed of a cell's sample; all are the same where everything is measured."""
    return 0 if task.sampling == EVERYTHING else cell.seed


def _prepare(task: Task, seed: int) -> PreparedTrace:
    name = task.trace.source, task.trace.trace_id, task.check, task.sampling, seed
    with _preparing:
        if name in _prepared:
            _prepared.move_to_end(name)
            return _prepared[name]
        source = task.trace.source
        trace = open_trace(fetch(source) if is_remote(source) else Path(source))
        if trace.trace_id != task.trace.trace_id:
            raise TraceError(f"{source}: another trace than when the sweep began; run it again")
        if task.check:
            check_trace(trace)
        while len(_prepared) >= _N_PREPARED:
            _prepared.popitem(last=False)
        _prepared[name] = PreparedTrace(trace, sampling=task.sampling, seed=seed)
        return _prepared[name]


def _replayed(task: Task, cell: SweepCell, prepared: PreparedTrace) -> tuple[dict[str, Any], int]:
    try:
        if cell.policy.parameters_json != cell.parameters:
            raise UserError(
                f"policy '{cell.policy.name}' reads another file than when the sweep began; allowed: "
                "the same file, and for other machines under the same absolute path"
            )
        done = prepared.replay(cell.policy, cell.budget, seed=cell.seed, waves=task.waves)
    except Exception as error:
        return _failed(task, cell, error)
    return done.row, done.exit_code


def _failed(task: Task, cell: SweepCell, error: Exception) -> tuple[dict[str, Any], int]:
    is_told = isinstance(error, UserError)
    message = " ".join((str(error) if is_told else f"{type(error).__name__}: {error}").split())
    return {
        "trace_id": task.trace.trace_id,
        "policy": cell.policy.name,
        "policy_params": cell.parameters,
        **budget_columns(cell.budget),
        "code_version": task.code_version,
        "seconds": 0.0,
        "status": "error",
        "error": message,
    }, error.exit_code if isinstance(error, UserError) else 1
