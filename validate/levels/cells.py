"""A level of policies x budgets over traces: one row per cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from transformers import PreTrainedModel
from transformers.utils import logging

from simulator.budget import Budget
from simulator.cells import cell_labels, code_version
from simulator.engine.cap import entries_of
from simulator.policies.language import Policy
from simulator.policies.wave import tell_unused
from traces.errors import UserError
from traces.store import find_traces, open_trace
from traces.trace import Trace
from validate.levels.folder import RowsFolder, cell_key
from validate.levels.outcomes import Forced, Masked, Shadow
from validate.levels.runs import Baseline, baseline_of
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
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(model, dtype or traces[0].shape.dtype, device, revision)
    limit_threads(loaded.model)
    tell_unused(waves, [own.model for own in traces])
    return loaded, traces


def compare(
    traces: Sequence[Trace],
    cells: Sequence[tuple[Policy, Budget]],
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
        kept = {} if folder is None else folder.rows(trace)
        given: dict[str, Baseline] = {}
        for policy, budget in cells:
            labels = cell_labels(trace, policy, budget)
            key = cell_key(labels)
            if key not in kept:
                try:
                    if model is not None and not given:
                        given = {"baseline": baseline_of(model, trace)}
                    entries = entries_of(budget, policy, trace.shape, trace.prompt_tokens, trace.total_tokens)
                    result = run(trace, policy, entries, **given)
                except UserError as error:
                    failed.append(error)
                    on_cell(trace.path.name)
                    continue
                facts = {"model": trace.model, "family": trace.manifest.task.get("family"), "status": "ok"}
                kept[key] = labels | facts | {"code_version": code_version()} | result.row()
                if folder is not None:
                    folder.write(trace, list(kept.values()))
                if isinstance(result, Forced):
                    columns = [pl.lit(value).alias(name) for name, value in labels.items()]
                    per_step.append(pl.DataFrame(result.steps()).select(*columns, pl.all()))
            rows.append(kept[key])
            on_cell(trace.path.name)
    if not rows:
        raise failed[0]
    steps = pl.concat(per_step) if per_step else pl.DataFrame()
    return pl.DataFrame(rows, infer_schema_length=None), steps, failed
