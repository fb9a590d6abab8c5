"""The shadow and forced levels of ``sim validate``: policies x budgets over traces, one row per cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from traces.errors import UserError
from validate.live.output import report_failed, write_text

if TYPE_CHECKING:
    from simulator.budget import Budget
    from simulator.policies.language import Policy


def compare_with_traces(
    level: str,
    trace: list[str] | None,
    model: str,
    revision: str | None,
    dtype: str | None,
    device: str,
    cells: list[tuple[Policy, Budget]],
    wave: list[Path] | None,
    seed: int,
    chosen: str,
    output: Path | None,
    steps: Path | None,
    quiet: bool = False,
) -> None:
    """Run the shadow or the forced level over traces and print one row per cell."""
    import polars as pl
    from transformers.utils import logging

    from simulator.cells import cell_labels
    from simulator.engine.cap import entries_of
    from simulator.engine.full_cache import FullCache
    from simulator.policies.wave import known_waves, tell_unused
    from simulator.results.output import tell_written, write_parquet
    from traces.store import find_traces, open_trace
    from validate.levels.runs import Forced, forced_steps, level_row, run_forced, run_shadow
    from validate.live.terminal import print_levels
    from validate.models.load import load_model
    from validate.models.threads import limit_threads

    if not trace:
        raise UserError(f"--level {level} needs --trace")
    opened = [open_trace(path) for path in find_traces(trace)]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(model, dtype or opened[0].shape.dtype, device, revision)
    limit_threads(loaded.model)
    waves = known_waves(list(wave or []))
    tell_unused(wave or [], [own.model for own in opened])
    rows, per_step, failed = [], [], []
    for own in opened:
        settings: dict[str, Any] = {"seed": seed, "waves": waves}
        if level == "forced":
            settings["full"] = FullCache(own)
        for policy, budget in cells:
            labels = cell_labels(own, policy, budget)
            run = run_shadow if level == "shadow" else run_forced
            try:
                entries = entries_of(budget, policy, own.shape, own.prompt_tokens, own.total_tokens)
                result = run(loaded.model, own, policy, entries, **settings)
            except UserError as error:
                failed.append(error)
                continue
            rows.append(labels | level_row(result))
            if steps is not None and isinstance(result, Forced):
                columns = [pl.lit(value).alias(name) for name, value in labels.items()]
                per_step.append(pl.DataFrame(forced_steps(result)).select(*columns, pl.all()))
    if not rows:
        raise failed[0]
    table = pl.DataFrame(rows, infer_schema_length=None)
    if steps is not None:
        write_parquet(pl.concat(per_step), steps)
    if output is not None and chosen == "parquet":
        write_parquet(table, output)
    elif chosen == "csv":
        write_text(table.write_csv(), output)
    elif chosen == "json":
        write_text(json.dumps(table.to_dicts(), indent=1) + "\n", output)
    else:
        print_levels(table, output)
    tell_written(output, len(table), quiet)
    tell_written(steps, sum(map(len, per_step)), quiet)
    report_failed(failed, len(failed) + len(rows), "cells")
    if level == "shadow" and table["mismatches"].sum():
        raise typer.Exit(1)
