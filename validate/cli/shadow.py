"""``sim validate shadow``: whether a policy decides beside a running model as it does in a replay."""

from __future__ import annotations

import typer

from simulator.cli import shared
from traces.seeds import require_seed
from validate.cli import options
from validate.models.shapes import asked_model


def shadow(
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
    seed: options.Seed = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Compare decisions with those of a replay.

    The trace's tokens go through its model again with the full cache, and the policy decides beside it. A
    decision that differs from the replay's is counted, and ends with exit code 1.
    """
    from functools import partial

    from simulator.policies.wave import known_waves
    from simulator.results.output import choose_format

    require_seed(seed, "--seed")
    source = asked_model(model, random_weights, "reference")
    chosen = choose_format(format, output)
    cells = options.asked_cells(policy, budget, configs, buffer)
    from validate.levels.cells import compare, open_traces
    from validate.levels.runs import run_shadow
    from validate.levels.terminal import print_levels
    from validate.live.output import put_out, report_failed

    loaded, traces = open_traces(trace, source, revision, dtype, device, wave or [])
    run = partial(run_shadow, loaded.model, seed=seed, waves=known_waves(wave or []))
    rows, _, failed = compare(traces, cells, "shadow", run)
    put_out(rows, partial(print_levels, table=rows), output, chosen, quiet=quiet)
    report_failed(failed, len(failed) + len(rows), "cells")
    if rows["mismatches"].sum():
        raise typer.Exit(1)
