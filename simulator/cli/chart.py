"""``sim chart``: one figure of how the budgets of KV heads go on over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli.completion import policies

if TYPE_CHECKING:
    import polars as pl


def chart(
    trajectory: Annotated[Path, typer.Argument(help="A file of sim replay --trajectory.")],
    out: Annotated[Path, typer.Option(help="FILE.svg, .png or .html.")],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            "-p",
            help="As its rows call it; needed if there are several, as the others are.",
            autocompletion=policies,
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="policy_params, where a policy was replayed with several.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="As it was asked, such as 20% or 128.")
    ] = None,
    trace: Annotated[str | None, typer.Option("--trace", "-t", help="Name of the trace.")] = None,
) -> None:
    """Draw how the budgets of KV heads go on over time.

    A panel per layer, a line per head, for one trace, policy and budget.
    """
    from traces.errors import UserError
    from traces.extras import require_extra

    require_extra("a figure", "altair", "vl_convert")
    from simulator.charts.head_budgets import SUFFIXES, head_budgets, save
    from simulator.results.labels import with_budget_label
    from simulator.results.output import require_place
    from simulator.results.store import read_table
    from simulator.results.tables import TRAJECTORY_SCHEMA

    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: suffix tells no format; allowed: {', '.join(SUFFIXES)}")
    require_place(out, "--out")
    rows = with_budget_label(read_table(trajectory, str(trajectory), TRAJECTORY_SCHEMA))
    asked = {"trace": trace, "policy": policy, "budget": budget, "policy_params": params}
    save(head_budgets(_cell(rows, asked)), out)
    print(f"wrote {out}")


def _cell(rows: pl.DataFrame, asked: dict[str, str | None]) -> pl.DataFrame:
    """Choose the rows of one cell, by what tells it from the others."""
    from traces.errors import UserError

    for name, value in asked.items():
        found = rows[name].unique(maintain_order=True).to_list()
        option = "--params" if name == "policy_params" else f"--{name}"
        if value is None and len(found) > 1:
            raise UserError(f"{option} is needed to choose one; allowed: {', '.join(found)}")
        if value is not None and value not in found:
            raise UserError(f"{option} is '{value}'; allowed: {', '.join(found)}")
        if value is not None:
            rows = rows.filter(rows[name] == value)
    return rows
