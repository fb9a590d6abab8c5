"""Verbs of the simulator: replay, calibrate, policies. Heavy imports wait inside the verb that needs them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli.completion import policies
from traces.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_POLICIES = "fullkv,streamingllm,snapkv,rkv,pyramid-rkv,reasonalloc,random,random-prompt"
DEFAULT_BUDGETS = "10%,20%,30%,50%"

TraceOption = Annotated[
    list[str], typer.Option("--trace", "-t", help="Trace, folder of traces or glob; repeats. 'sample' ships.")
]


def replay(
    trace: TraceOption,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Comma list such as rkv+wave,reasonalloc:delta=64 or FILE.py:CLASS.",
            show_default=DEFAULT_POLICIES.replace(",", ", "),
            autocompletion=policies,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            help="Comma list: 128 entries, 5% of the full cache, 64MiB; with ! (64MiB!) a cap on the peak.",
            show_default=DEFAULT_BUDGETS.replace(",", ", "),
        ),
    ] = None,
    buffer: Annotated[
        int | None, typer.Option(help="Entries added between compressions, for every policy (default 128).")
    ] = None,
    wave: Annotated[list[Path] | None, typer.Option(help="Wave made by sim calibrate; repeats.")] = None,
    retained: Annotated[
        Path | None, typer.Option(help="Write who is retained after every compression (Parquet).")
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option(help="Write budgets and mass between compressions (Parquet).")
    ] = None,
    format: Annotated[str | None, typer.Option(help="table, csv, json or parquet.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write rows to this file.")] = None,
    check: Annotated[bool, typer.Option(help="Check checksums and invariants of every trace first.")] = True,
    sample_queries: Annotated[
        str | None, typer.Option(help="Share of decode steps to measure, such as 1/8; all decide.")
    ] = None,
    sample_layers: Annotated[int | None, typer.Option(help="Layers to measure; all are replayed.")] = None,
    sample_heads: Annotated[int | None, typer.Option(help="KV heads of a layer to measure.")] = None,
    seed: Annotated[int, typer.Option(help="For policies that draw at random, and samples.")] = 0,
    jobs: Annotated[int, typer.Option(help="Threads; 0 uses all cores.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what it took.")] = False,
) -> None:
    """Replay policies x budgets over traces and print one table."""
    from simulator.workers.blas import use_one_thread, warn

    use_one_thread()
    from simulator.kernels.compiled import tell_compiling

    tell_compiling()
    from simulator.budget import parse_budgets
    from simulator.cells import run_replay
    from simulator.engine.sampling import parse_sampling
    from simulator.policies.language import parse_policies
    from simulator.policies.wave import tell_unused
    from simulator.results.labels import row_budget
    from simulator.results.output import (
        choose_format,
        require_parquet,
        require_places,
        tell_written,
        write_parquet,
        write_rows,
    )
    from traces.seeds import require_seed
    from traces.store import find_traces

    sampling = parse_sampling(sample_queries, sample_layers, sample_heads)
    chosen = choose_format(format, output)
    beside = {"--retained": retained, "--trajectory": trajectory}
    require_parquet(beside)
    require_places({"-o": output, **beside})
    require_seed(seed, "--seed")
    policies = parse_policies(policy or [DEFAULT_POLICIES], buffer)
    budgets = parse_budgets(budget or [DEFAULT_BUDGETS])
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
            keep_retained=retained is not None,
            keep_trajectory=trajectory is not None,
            sampling=sampling,
            check=check,
            on_cell=advance,
        )
    tell_unused(wave or [], result.table["model"])
    write_rows(result.table, output, chosen)
    tell_written(output, len(result.table), quiet)
    for path, own in ((retained, result.retained), (trajectory, result.trajectory)):
        if path is not None:
            write_parquet(own, path)
            tell_written(path, len(own), quiet)
    if verbose:
        seconds = result.table["seconds"].sum()
        version = result.table["code_version"][0]
        print(
            f"sim: {counted(len(result.table), 'cell')}, {seconds:.1f} s in all, code {version}",
            file=sys.stderr,
        )
    failed = result.table.filter(result.table["status"] != "ok")
    for row in failed.unique("error", keep="first", maintain_order=True).iter_rows(named=True):
        print(f"sim: {row['trace']}, {row['policy']} at {row_budget(row)}: {row['error']}", file=sys.stderr)
    if result.exit_code:
        print(f"sim: {len(failed)} of {counted(len(result.table), 'cell')} failed", file=sys.stderr)
        raise typer.Exit(result.exit_code)


def calibrate(
    trace: TraceOption,
    out: Annotated[Path, typer.Option(help="Where to write the wave (JSON).")],
    rho: Annotated[float, typer.Option(help="Attention mass to hold.")] = 0.93,
    steps: Annotated[int, typer.Option(help="Decode steps sampled per trace.")] = 64,
    check: Annotated[bool, typer.Option(help="Check checksums and invariants of every trace first.")] = True,
) -> None:
    """Measure the Reasoning Wave: how many entries each layer needs.

    The wave allocator divides a budget by it.
    """
    from simulator.workers.blas import use_one_thread, warn

    use_one_thread()
    from simulator.kernels.compiled import tell_compiling

    tell_compiling()

    from simulator.engine.demand import calibrate as measure
    from simulator.results.output import require_place
    from traces.errors import UserError
    from traces.store import find_traces, open_trace

    if steps < 1:
        raise UserError(f"--steps is {steps}; allowed: 1 or more")
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


policies_app = typer.Typer(no_args_is_help=True, help="Policies by name: what there is, and what each does.")


FormatOption = Annotated[str, typer.Option("--format", help="text or json.")]


@policies_app.command("list")
def list_policies(format: FormatOption = "text") -> None:
    """List the policies and the parts they are made of."""
    from simulator.policies.catalogue import list_text, listing

    _print(format, lambda: list_text(_width()), listing)


@policies_app.command("show")
def show_policy(
    name: Annotated[str, typer.Argument(help="A policy, one of its parts, or FILE.py:CLASS.")],
    format: FormatOption = "text",
) -> None:
    """Show parts, parameters, source and needs of a policy.

    Parameters come with defaults and meanings, the source with known deviations.
    """
    from simulator.policies.catalogue import cards, described, show_text

    _print(format, lambda: show_text(name, _width()), lambda: described(cards(name)))


def _print(format: str, text: Callable[[], str], data: Callable[[], Any]) -> None:
    import json

    from traces.errors import UserError

    if format not in ("text", "json"):
        raise UserError(f"--format is '{format}'; allowed: text, json")
    print(text() if format == "text" else json.dumps(data(), indent=1))


def _width() -> int:
    import shutil

    # Lines longer than that are read worse, whatever the terminal holds.
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))


def worker_count(jobs: int) -> int:
    """Give the threads that ``--jobs`` stands for.

    Raises
    ------
    UserError
        If it is negative.
    """
    import os

    from traces.errors import UserError

    if jobs < 0:
        raise UserError(f"--jobs is {jobs}; allowed: 0 (all cores) or more")
    if hasattr(os, "sched_getaffinity"):
        return jobs or len(os.sched_getaffinity(0))
    return jobs or os.cpu_count() or 1


@contextmanager
def progress(doing: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal while ``doing``; gives what advances it by one of ``total``."""
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)
