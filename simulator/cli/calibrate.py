"""``sim calibrate``: the wave of a model, measured from its traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from traces.wording import counted


def calibrate(
    trace: shared.Traces,
    out: Annotated[Path, typer.Option(help="Where to write the wave (JSON).")],
    rho: Annotated[float, typer.Option(help="Attention mass to hold.")] = 0.93,
    steps: Annotated[int, typer.Option(help="Decode steps sampled per trace.")] = 64,
    check: shared.Check = True,
) -> None:
    """Measure the Reasoning Wave: how many entries each layer needs.

    The wave allocator divides a budget by it.
    """
    shared.prepare_kernels()
    from simulator.engine.demand import calibrate as measure
    from simulator.results.output import require_place
    from simulator.workers.blas import warn
    from traces.store import find_traces, open_trace

    shared.require_counts(steps=steps)
    require_place(out, "--out")
    warn(n_workers=1)
    wave = measure([open_trace(path) for path in find_traces(trace)], rho, steps, check=check)
    wave.write(out)
    print(
        f"wave of {wave.model} from {counted(len(wave.trace_ids), 'trace')}, "
        f"{counted(wave.n_steps, 'decode step')}"
    )
    print(f"entries per KV head that hold {rho:g} of the attention:")
    widest = max(wave.demand)
    for layer, demand in enumerate(wave.demand):
        heads = " ".join(f"{value:6.1f}" for value in wave.head_demand[layer])
        print(f"  layer {layer:2d} {demand:7.1f}  {'#' * round(30 * demand / widest):30s}  heads {heads}")
    print(f"wrote {out}")
