"""``sim validate masked``: what a model predicts that sees no more than a replay retains."""

from __future__ import annotations

from simulator.cli import shared
from traces.progress import progress
from traces.seeds import require_seed
from validate.cli import options
from validate.models.shapes import asked_model


def masked(
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
    format: shared.Format = None,
    output: shared.Output = None,
    out: options.RowsOut = None,
    seed: options.Seed = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Hide what a replay evicts, in one pass over each text.

    The decisions are the replay's. It is the cheapest way to real predictions: nothing is evicted, and a cell
    costs one forward pass.
    """
    from functools import partial

    from simulator.policies.wave import known_waves
    from simulator.results.output import choose_format, require_places

    require_seed(seed, "--seed")
    source = asked_model(model, random_weights, "reference")
    chosen = choose_format(format, output)
    require_places({"-o": output})
    if out is not None:
        options.make_folder(out)
    cells = options.asked_cells(policy, budget, configs, buffer)
    from validate.levels.cells import compare, open_traces
    from validate.levels.folder import rows_folder
    from validate.levels.runs import run_masked
    from validate.levels.terminal import print_levels
    from validate.live.output import put_out, report_failed

    loaded, traces = open_traces(trace, source, revision, dtype, device, wave or [])
    run = partial(run_masked, loaded.model, seed=seed, waves=known_waves(wave or []))
    folder = rows_folder(out, "masked", loaded, seed, wave or [])
    with progress("masked", len(traces) * len(cells), quiet) as advance:
        rows, _, failed = compare(
            traces, cells, "masked", run, loaded.model, folder, lambda trace: advance(advance=1, told=trace)
        )
    put_out(rows, partial(print_levels, table=rows), output, chosen, quiet=quiet)
    report_failed(failed, len(failed) + len(rows), "cells")
