"""``sim results``: read rows that replays and sweeps wrote, and compare policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli.completion import compared
from simulator.results.metric_names import COMPARED, MEASURED, asked_metric

if TYPE_CHECKING:
    import polars as pl


def results(
    files: Annotated[
        list[Path], typer.Argument(help="Rows of sim replay -o (Parquet, CSV, JSON), folders of sim sweep.")
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            help=f"Compare policies by this number, budget by budget: {', '.join(COMPARED)}.",
            autocompletion=compared,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Only these policies, as rows or tables call them; globs too."),
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only traces of these families; repeats.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="Only these budgets, such as 128,20%,64MiB.")
    ] = None,
    trace: Annotated[
        list[str] | None, typer.Option("--trace", "-t", help="Only traces of these names or globs; repeats.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="table, csv, json, parquet; markdown with --metric.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    means: Annotated[
        bool, typer.Option("--means", help="Average rows over traces; csv, json, parquet.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="With --metric: of the bootstrap over traces.", show_default="0")
    ] = None,
) -> None:
    """Read, filter and compare rows of replays and sweeps."""
    import polars as pl

    from simulator.results.layout import plain_console
    from simulator.results.means import cell_means
    from simulator.results.output import choose_format, tell_written, write_rows
    from simulator.results.standings import standings
    from simulator.results.tables import by_model
    from simulator.results.terminal import print_standings, print_unevicted
    from simulator.sweep.rows import read_rows
    from traces.errors import UserError

    if metric is not None:
        metric = asked_metric(metric)
    if seed is not None and metric is None:
        raise UserError("--seed is given without --metric; allowed: with --metric, whose intervals it draws")
    as_markdown = format == "markdown"
    if as_markdown and (metric is None or output is not None):
        raise UserError(
            "--format markdown is for a terminal, with --metric; allowed: table, csv, json, parquet"
        )
    chosen = "table" if as_markdown else choose_format(format, output)
    if metric is not None and output is not None and chosen == "table":
        raise UserError(f"-o {output}: standings go to a terminal, or as rows; allowed: csv, json, parquet")
    if means and (metric is not None or chosen == "table"):
        raise UserError("--means goes with -o FILE or --format csv, json, parquet, and without --metric")
    rows = read_rows(files)
    if rows.is_empty():
        raise UserError(
            f"{', '.join(map(str, files))}: no row is whole there; allowed: rows of cells that are done"
        )
    table = _chosen(rows, policy, family, budget, trace)
    if metric is None:
        table = cell_means(table) if means else table
        write_rows(table, output, chosen)
        tell_written(output, len(table))
        return
    if metric not in table.columns:
        writer = "sim validate masked or forced" if metric in MEASURED else "a version that writes it"
        raise UserError(f"{files[0]} has no column '{metric}'; allowed: rows of {writer}")
    of_models = by_model(table)
    found = [standings(own, metric, seed=seed or 0) for own in of_models]
    if all(own.is_empty() for own in found):
        raise UserError("no row is of a policy that evicted; nothing to compare")
    if chosen != "table":
        named = [
            own.with_columns(model=pl.lit(of["model"][0])) for own, of in zip(found, of_models, strict=True)
        ]
        write_rows(found[0] if len(found) == 1 else pl.concat(named, how="diagonal"), output, chosen)
        return
    console = plain_console(200)
    for own, of_model in zip(found, of_models, strict=True):
        if len(found) > 1:
            console.print(f"{of_model['model'][0]}:", highlight=False)
        if not own.is_empty():
            models = of_model["model"].drop_nulls().unique().to_list()
            print_standings(own, metric, models, console, as_markdown=as_markdown)
        print_unevicted(of_model, console)


def _chosen(
    table: pl.DataFrame,
    policy: list[str] | None,
    family: list[str] | None,
    budget: list[str] | None,
    trace: list[str] | None,
) -> pl.DataFrame:
    """Keep the rows that are asked for."""
    from simulator.budget import parse_budgets
    from simulator.policies.language import split_list
    from simulator.results.standings import at_budgets, of_policies, of_traces
    from traces.errors import UserError

    if family:
        known = sorted(set(table["family"].drop_nulls()))
        unknown = sorted(set(family) - set(known))
        if unknown:
            raise UserError(f"--family is '{unknown[0]}'; the rows have: {', '.join(known)}")
        table = table.filter(table["family"].is_in(family))
    if policy:
        table = of_policies(table, [name for text in policy for name in split_list(text)])
    if budget:
        table = at_budgets(table, parse_budgets(budget))
    return of_traces(table, trace) if trace else table
