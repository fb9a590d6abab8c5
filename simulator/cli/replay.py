"""``sim replay``: policies x budgets over traces, as one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from simulator.cli.completion import policies
from traces.progress import progress
from traces.wording import counted


def replay(
    trace: shared.Traces,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Comma list such as rkv+wave,reasonalloc:delta=64 or FILE.py:CLASS.",
            show_default=shared.DEFAULT_POLICIES.replace(",", ", "),
            autocompletion=policies,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            help="Comma list: 128 entries, 5% of the full cache, 64MiB; 64MiB! caps the peak, 128+prompt "
            "comes on top of a prompt that is kept.",
            show_default=shared.DEFAULT_BUDGETS.replace(",", ", "),
        ),
    ] = None,
    buffer: shared.Buffer = None,
    wave: shared.Waves = None,
    calibration: shared.Calibrations = None,
    retained: Annotated[
        Path | None, typer.Option(help="Write who is retained after every compression (Parquet).")
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option(help="Write budgets and mass between compressions (Parquet).")
    ] = None,
    format: shared.Format = None,
    output: shared.Output = None,
    check: shared.Check = True,
    sample_queries: Annotated[
        str | None, typer.Option(help="Share of decode steps to measure, such as 1/8; all decide.")
    ] = None,
    sample_layers: Annotated[int | None, typer.Option(help="Layers to measure; all are replayed.")] = None,
    sample_heads: Annotated[int | None, typer.Option(help="KV heads of a layer to measure.")] = None,
    block: Annotated[int, typer.Option(help="Tokens of a block, for the memory of paged caches.")] = 16,
    seed: Annotated[int, typer.Option(help="For policies that draw at random, and samples.")] = 0,
    jobs: shared.Threads = 0,
    quiet: shared.Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what it took.")] = False,
) -> None:
    """Replay policies x budgets over traces and print one table."""
    shared.prepare_kernels()
    from simulator.budget import parse_budgets
    from simulator.cells import run_replay
    from simulator.engine.sampling import parse_sampling
    from simulator.policies.language import parse_policies
    from simulator.results.output import (
        choose_format,
        require_parquet,
        require_places,
        tell_written,
        write_parquet,
        write_rows,
    )
    from simulator.workers.blas import warn
    from simulator.workers.cores import worker_count
    from traces.seeds import require_seed
    from traces.store import find_traces

    sampling = parse_sampling(sample_queries, sample_layers, sample_heads)
    chosen = choose_format(format, output)
    beside = {"--retained": retained, "--trajectory": trajectory}
    require_parquet(beside)
    require_places({"-o": output, **beside})
    require_seed(seed, "--seed")
    policies = parse_policies(policy or [shared.DEFAULT_POLICIES], buffer)
    budgets = parse_budgets(budget or [shared.DEFAULT_BUDGETS])
    paths = find_traces(trace)
    workers = worker_count(jobs)
    warn(workers)
    with progress("replaying", len(paths) * len(policies) * len(budgets), quiet) as advance:
        result = run_replay(
            paths,
            policies,
            budgets,
            seed=seed,
            jobs=workers,
            waves=wave or [],
            calibrations=calibration or [],
            keep_retained=retained is not None,
            keep_trajectory=trajectory is not None,
            sampling=sampling,
            check=check,
            block=block,
            on_cell=advance,
        )
    shared.tell_unused(wave or [], calibration or [], result.table["model"])
    write_rows(result.table, output, chosen)
    tell_written(output, len(result.table), quiet)
    for path, own in ((retained, result.retained), (trajectory, result.trajectory)):
        if path is not None:
            write_parquet(own, path)
            tell_written(path, len(own), quiet)
    if verbose:
        took = f"{result.table['seconds'].sum():.1f} s in all, code {result.table['code_version'][0]}"
        print(f"sim: {counted(len(result.table), 'cell')}, {took}", file=sys.stderr)
    shared.tell_failed(result.table)
    if result.exit_code:
        n_failed = (result.table["status"] != "ok").sum()
        print(f"sim: {n_failed} of {counted(len(result.table), 'cell')} failed", file=sys.stderr)
        raise typer.Exit(result.exit_code)
