"""``sim validate forced``: how far real eviction drifts from what a replay says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from traces.errors import UserError
from traces.progress import progress
from traces.seeds import require_seed
from validate.cli import options
from validate.models.shapes import asked_model


def forced(
    trace: shared.Traces,
    model: options.Model = None,
    random_weights: options.RandomWeights = None,
    revision: options.Revision = None,
    dtype: options.TracesDtype = None,
    device: options.Device = "auto",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    configs: options.Configs = None,
    buffer: shared.Buffer = None,
    wave: shared.Waves = None,
    steps: Annotated[
        Path | None, typer.Option(help="Write mass per layer and step to this file (Parquet).")
    ] = None,
    format: shared.Format = None,
    output: shared.Output = None,
    out: options.RowsOut = None,
    seed: options.Seed = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Evict for real while the tokens stay the trace's.

    Retained mass is told beside the simulated one: how far they are apart is the price of an open loop.
    """
    from functools import partial

    from simulator.policies.wave import known_waves
    from simulator.results.output import (
        choose_format,
        require_parquet,
        require_places,
        tell_written,
        write_parquet,
    )

    require_seed(seed, "--seed")
    source = asked_model(model, random_weights, "reference")
    chosen = choose_format(format, output)
    require_places({"-o": output, "--steps": steps})
    require_parquet({"--steps": steps})
    if out is not None and steps is not None:
        raise UserError("--steps contradicts --out, which keeps rows of cells only; give one of them")
    if out is not None:
        options.make_folder(out)
    cells = options.asked_cells(policy, budget, configs, buffer)
    from validate.levels.cells import compare, open_traces
    from validate.levels.folder import rows_folder
    from validate.levels.runs import run_forced
    from validate.levels.terminal import print_levels
    from validate.live.output import put_out, report_failed

    loaded, traces = open_traces(trace, source, revision, dtype, device, wave or [])
    run = partial(run_forced, loaded.model, seed=seed, waves=known_waves(wave or []))
    folder = rows_folder(out, "forced", loaded, seed, wave or [])
    with progress("forced", len(traces) * len(cells), quiet) as advance:
        rows, per_step, failed = compare(
            traces, cells, "forced", run, loaded.model, folder, lambda trace: advance(advance=1, told=trace)
        )
    if steps is not None:
        write_parquet(per_step, steps)
    put_out(rows, partial(print_levels, table=rows), output, chosen, quiet=quiet)
    tell_written(steps, len(per_step), quiet)
    report_failed(failed, len(failed) + len(rows), "cells")
