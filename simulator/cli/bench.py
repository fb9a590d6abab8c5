"""The verb ``sim bench``: what this machine can do, and how much of it replays use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import shared
from traces.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

_TOKENS, _QUICK_TOKENS = 16_384, 1024


def bench(
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the standard trace.", show_default=f"{_TOKENS}, quick {_QUICK_TOKENS}"),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Replays of each case; the fastest counts.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A short trace and one budget: seconds.")] = False,
    long: Annotated[bool, typer.Option("--long", help="A trace four times as long as well.")] = False,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the traces.", show_default="one per thread")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    jobs: shared.Threads = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Time standard replays against what this machine can do.

    Each is stated as a fraction of the rate of matrix products.
    """
    from simulator.workers.blas import use_one_thread, warn
    from simulator.workers.cores import worker_count
    from traces.errors import UserError

    use_one_thread()
    from simulator.bench.cases import make_plan, run_bench

    shared.require_counts(repeat=repeat)
    if quick and long:
        raise UserError("--quick and --long are both given; allowed: one of them")
    workers = worker_count(jobs)
    tokens = (_QUICK_TOKENS if quick else _TOKENS) if tokens is None else tokens
    plan = make_plan(tokens, workers, repeat=repeat, quick=quick, long=long, layers=layers)
    warn(workers)
    with progress("measuring", len(plan.cases) + 1, quiet) as advance:
        result = run_bench(plan, advance)
    if json:
        from json import dumps

        print(dumps(result, indent=1))
    else:
        print_bench(result)


def print_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the machine's rates, a table of the cases and how time grows, as ``run_bench`` gives them."""
    from simulator.results.layout import plain_console

    console = console or plain_console(110)
    machine, cases = result["machine"], result["cases"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    forced = f", OPENBLAS_CORETYPE={machine['openblas_coretype']}" if machine["openblas_coretype"] else ""
    lines = [
        f"{cores}: {machine['sgemm_gflops']:.0f} GFLOP/s of float32 products "
        f"({machine['sgemm_gflops_one_core']:.0f} on one; {machine['blas']}{forced}), "
        f"{machine['exp_ns']:.2f} ns an exp, {machine['copy_gbs']:.1f} GB/s copied.",
        f"Each case replays {cases[0]['layers']} layers of an 8B model. Useful is what no replay can avoid;",
        "of sgemm compares it with the products' rate on as many threads, measured in the same process.",
    ]
    if machine["bfloat16_pairs"]:
        lines.append(
            "This processor multiplies bfloat16 numbers in pairs, as sgemm does not: replays can pass 100%."
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    shown = shared.number_table(
        *("\npolicy", "\ntokens", "\nbudget", "\nworkers", "useful\nGFLOP", "\nseconds"),
        *("\nGFLOP/s", "of\nsgemm", "peak\nMB"),
    )
    for case in cases:
        shown.add_row(
            case["policy"] + ("" if case["queries"] == "1" else f", {case['queries']} of queries"),
            f"{case['tokens']:,}",
            "all" if case["budget"] is None else f"{case['budget']:,}",
            str(case["workers"]),
            f"{case['useful_gflop']:.2f}",
            f"{case['seconds']:.3f}",
            f"{case['useful_gflop'] / case['seconds']:.0f}",
            f"{case['fraction_of_sgemm']:.0%}",
            f"{case['peak_rss_mb']:.0f}",
        )
    console.print(shown)
    told = {
        "tokens_exponent": "Time grows as tokens to the power of {:.2f}.",
        "budget_exponent": "Time grows as entries held (budget + buffer / 2) to the power of {:.2f}.",
        "worker_speedup": "All workers are {:.2f} times as fast as one.",
        "eighth_of_queries": "With an eighth of the queries measured it takes {:.2f} of the time.",
    }
    for name, text in told.items():
        if name in result["growth"]:
            console.print(text.format(result["growth"][name]), highlight=False)
