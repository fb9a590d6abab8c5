"""``sim report``: a replay as one page that opens anywhere, without a network."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import shared
from simulator.cli.completion import metrics, policies
from simulator.results.metric_names import DEFAULT_METRIC, METRICS
from traces.atomic import write_text
from traces.errors import UserError
from traces.progress import progress
from traces.wording import counted

if TYPE_CHECKING:
    import polars as pl

    from traces.trace import Trace


def report(
    out: Annotated[Path, typer.Option(help="Where to write the page (FILE.html).")],
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Rows of sim replay -o, folders of sim sweep, or of one sim search. "
            "Without them, --trace is replayed."
        ),
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option(help="File of sim replay --trajectory: maps and budgets of heads.")
    ] = None,
    retained: Annotated[
        Path | None, typer.Option(help="File of sim replay --retained: which tokens were kept; with --trace.")
    ] = None,
    trace: Annotated[
        list[str] | None, typer.Option("--trace", "-t", help="Traces whose text is shown, or to replay.")
    ] = None,
    fidelity: Annotated[
        Path | None, typer.Option(help="fidelity.csv of sim validate live; with --accuracy.")
    ] = None,
    accuracy: Annotated[
        Path | None, typer.Option(help="accuracy.csv of sim validate live; with --fidelity.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What counts as quality, a comma list of {', '.join(METRICS)}.",
            show_default=DEFAULT_METRIC,
            autocompletion=metrics,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Policies to replay; of rows, only these.",
            show_default="all",
            autocompletion=policies,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="Budgets to replay; of rows, only these.", show_default="all"),
    ] = None,
    buffer: Annotated[
        int | None, typer.Option(help="Of a replay: entries added between compressions (default 128).")
    ] = None,
    charts: Annotated[Path | None, typer.Option(help="Folder for every chart as SVG and PNG.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and for policies that draw.")] = 0,
    jobs: Annotated[int, typer.Option(help="Threads of a replay; 0 uses all cores.")] = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Write rows, or a replay made for it, as one page.

    It opens anywhere, without a network.
    """
    from simulator.policies.language import split_list
    from simulator.results.output import require_place
    from traces.extras import require_extra
    from traces.seeds import require_seed
    from traces.store import find_traces, open_trace

    require_extra("a report", "altair", "vl_convert", "jinja2")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: suffix is '{out.suffix}'; allowed: .html")
    require_place(out, "--out")
    require_seed(seed, "--seed")
    _require_together(results, trace, trajectory, retained, fidelity, accuracy, buffer)
    from simulator.report.contents import known_metrics
    from simulator.report.contents import report as made
    from simulator.report.search_section import held_out_rows, is_search, search_section
    from simulator.report.sources import chosen, read_parquet
    from simulator.results.tables import RETAINED_SCHEMA, TRAJECTORY_SCHEMA
    from simulator.sweep.rows import read_rows

    asked_policies = [name for text in policy or [] for name in split_list(text)]
    asked_budgets = [item for text in budget or [] for item in text.split(",")]
    traces = [open_trace(path) for path in find_traces(trace or [])]
    searches = [path for path in results or [] if is_search(path)]
    if len(searches) > 1:
        raise UserError(f"{searches[1]} is a second search; allowed: one on a page")
    if results:
        rows = read_rows([held_out_rows(path) if path in searches else path for path in results])
        over_time = (
            None if trajectory is None else read_parquet(trajectory, TRAJECTORY_SCHEMA, "--trajectory")
        )
        kept = None if retained is None else read_parquet(retained, RETAINED_SCHEMA, "--retained", traces)
        sources = chosen(rows, over_time, kept, asked_policies, asked_budgets)
    else:
        replayed = _replay(traces, policy, budget, buffer, seed, jobs, quiet)
        sources = chosen(*replayed, [], [])
    metrics = known_metrics(sources.rows, [name for text in metric or [] for name in text.split(",")])
    section = None
    if fidelity is not None and accuracy is not None:
        from validate.live.fidelity_section import fidelity_section

        section = fidelity_section(sources.rows, fidelity, accuracy, metrics)
    searched = search_section(searches[0]) if searches else None
    command = shlex.join(["sim", *sys.argv[1:]])
    page = made(sources, metrics, traces, section, seed, searched, command)
    write_text(out, page.text)
    print(f"wrote {out} ({len(page.text.encode()) / 1e6:.1f} MB, {counted(len(page.figures), 'chart')})")
    if charts is not None:
        charts.mkdir(parents=True, exist_ok=True)
        n_written = sum(len(figure.export(charts)) for figure in page.figures)
        print(f"wrote {n_written} pictures to {charts}")


def _require_together(
    results: list[Path] | None,
    trace: list[str] | None,
    trajectory: Path | None,
    retained: Path | None,
    fidelity: Path | None,
    accuracy: Path | None,
    buffer: int | None,
) -> None:
    """Refuse options without those that they go with."""
    if (fidelity is None) != (accuracy is None):
        alone, other = ("--fidelity", "--accuracy") if accuracy is None else ("--accuracy", "--fidelity")
        raise UserError(f"{alone} is given without {other}; needed: both, of one sim validate live")
    if retained is not None and not trace:
        raise UserError(
            "--retained is given without --trace; needed: the trace that was replayed, for its text"
        )
    if not results and (trajectory is not None or retained is not None):
        option = "--trajectory" if trajectory is not None else "--retained"
        raise UserError(f"{option} goes with rows of the same replay; needed: a file of sim replay -o")
    if results and buffer is not None:
        raise UserError("--buffer is for a replay; allowed: with --trace and without rows")
    if not results and not trace:
        raise UserError("sim report needs rows of sim replay -o, or --trace to replay")


def _replay(
    traces: list[Trace],
    policy: list[str] | None,
    budget: list[str] | None,
    buffer: int | None,
    seed: int,
    jobs: int,
    quiet: bool,
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Replay everything the page can show: rows, and trajectory and retained rows of the first trace.

    Raises
    ------
    UserError
        If no cell succeeded.
    """
    shared.prepare_kernels()
    import polars as pl

    from simulator.budget import parse_budgets
    from simulator.cells import run_replay
    from simulator.policies.language import parse_policies
    from simulator.results.tables import require_one_model
    from simulator.workers.blas import warn
    from simulator.workers.cores import worker_count

    policies = parse_policies(policy or [shared.DEFAULT_POLICIES], buffer)
    budgets = parse_budgets(budget or [shared.DEFAULT_BUDGETS])
    require_one_model(trace.model for trace in traces)
    workers = worker_count(jobs)
    warn(workers)
    rows = []
    with progress("replaying", len(traces) * len(policies) * len(budgets), quiet) as advance:
        # The page shows the heads and tokens of one trace; those of all would not fit into memory.
        for part, is_shown in ((traces[:1], True), (traces[1:], False)):
            if part:
                done = run_replay(
                    part,
                    policies,
                    budgets,
                    seed=seed,
                    jobs=workers,
                    keep_retained=is_shown,
                    keep_trajectory=is_shown,
                    on_cell=advance,
                )
                rows.append(done)
    table = pl.concat([done.table for done in rows])
    if (table["status"] != "ok").all():
        refused = UserError(f"no cell could be replayed: {table['error'][0]}")
        refused.exit_code = rows[0].exit_code
        raise refused
    return table, rows[0].trajectory, rows[0].retained
