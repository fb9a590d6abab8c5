"""A level of policies x budgets over traces: one row per cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import polars as pl
from transformers import PreTrainedModel
from transformers.utils import logging

from simulator.budget import Budget
from simulator.cells import cell_labels
from simulator.engine.cap import entries_of, under_budget
from simulator.policies.language import Policy
from simulator.policies.wave import tell_unused
from simulator.results.tables import require_one_model
from traces.errors import UserError
from traces.store import find_traces, open_trace
from traces.trace import Trace
from validate.levels.folder import RowsFolder, cell_key, level_version
from validate.levels.outcomes import Forced, Masked, Shadow
from validate.levels.runs import baseline_of
from validate.models.load import LoadedModel, load_model
from validate.models.threads import limit_threads


def open_traces(
    patterns: list[str],
    model: str,
    revision: str | None,
    dtype: str | None,
    device: str,
    waves: Sequence[Path],
) -> tuple[LoadedModel, list[Trace]]:
    """Open traces and load their model, in the first one's type unless another is asked for.

    Raises
    ------
    UserError
        If a trace or the model cannot be read.
    """
    traces = [open_trace(path) for path in find_traces(patterns)]
    require_one_model(trace.model for trace in traces)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(model, dtype or traces[0].shape.dtype, device, revision)
    limit_threads(loaded.model)
    tell_unused(waves, [own.model for own in traces])
    return loaded, traces


def compare(
    traces: Sequence[Trace],
    cells: Sequence[tuple[Policy, Budget]],
    level: str,
    run: Callable[..., Shadow | Masked | Forced],
    model: PreTrainedModel | None = None,
    folder: RowsFolder | None = None,
    on_cell: Callable[[str], None] = lambda trace: None,
) -> tuple[pl.DataFrame, pl.DataFrame, list[UserError]]:
    """Run every cell at a level.

    Parameters
    ----------
    traces : sequence of Trace
    cells : sequence of (Policy, Budget)
    level : str
        Its name, which rows tell.
    run : callable
        Of a trace, a policy and a budget in entries.
    model : PreTrainedModel, optional
        Of the traces, where ``run`` takes its baseline: made once per trace.
    folder : RowsFolder, optional
        Rows that are there are not run again, others are added.
    on_cell : callable
        Told of the trace of every cell that is done.

    Returns
    -------
    polars.DataFrame
        One row per cell.
    polars.DataFrame
        Of a forced level one row per cell, layer and decode step.
    list of UserError
        Why cells failed.

    Raises
    ------
    UserError
        The first, if all failed.
    """
    rows, per_step, failed = [], [], []
    for trace in traces:
        done = {} if folder is None else folder.done(trace)
        given = {} if model is None else {"baseline": cache(partial(baseline_of, model, trace))}
        for policy, budget in cells:
            labels = cell_labels(trace, policy, budget)
            row = done.get(cell_key(labels))
            if row is None:
                try:
                    entries = entries_of(budget, policy, trace.shape, trace.prompt_tokens, trace.total_tokens)
                    result = run(trace, under_budget(policy, budget), entries, **given)
                except UserError as error:
                    failed.append(error)
                    on_cell(trace.path.name)
                    continue
                row = labels | _facts(trace, level) | result.row()
                if folder is not None:
                    folder.add(trace, row)
                if isinstance(result, Forced):
                    columns = [pl.lit(value).alias(name) for name, value in labels.items()]
                    per_step.append(pl.DataFrame(result.steps()).select(*columns, pl.all()))
            rows.append(row)
            on_cell(trace.path.name)
    if not rows:
        raise failed[0]
    steps = pl.concat(per_step) if per_step else pl.DataFrame()
    return pl.DataFrame(rows, infer_schema_length=None), steps, failed


def _facts(trace: Trace, level: str) -> dict[str, object]:
    return {
        "level": level,
        "model": trace.model,
        "family": trace.manifest.task.get("family"),
        "code_version": level_version(),
        "status": "ok",
    }
