"""``sim validate calibrate``: what a shift of predictions is in nats of divergence, for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from simulator.cli.completion import policies
from traces.wording import counted


def calibrate(
    trace: shared.Traces,
    shifts: Annotated[list[Path], typer.Option(help="Rows of sim replay on these traces; repeats.")],
    measured: Annotated[
        list[Path], typer.Option(help="Rows of sim validate masked or forced on the same texts; repeats.")
    ],
    out: Annotated[Path, typer.Option(help="Where to write the calibration (JSON).")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Only rows of these policies, as rows call them.",
            show_default="all",
            autocompletion=policies,
        ),
    ] = None,
) -> None:
    """Fit measured divergence to the shifts that a replay told.

    A replay of other traces of the model with sensitivities then predicts divergence, within the shifts that
    were measured.
    """
    from math import exp

    import polars as pl

    from simulator.policies.language import split_list
    from simulator.results.calibration import calibrate as fit
    from simulator.results.output import require_place
    from simulator.sweep.rows import read_rows
    from traces.errors import UserError
    from traces.store import find_traces, open_trace

    require_place(out, "--out")
    traces = [open_trace(path) for path in find_traces(trace)]
    told, truth = read_rows(shifts), read_rows(measured)
    for option, rows, column, source in (
        ("--shifts", told, "shift_mean", "traces with sensitivities"),
        ("--measured", truth, "kl_mean", "sim validate masked or forced"),
    ):
        if column not in rows.columns or not rows[column].count():
            raise UserError(f"{option} has no {column}; allowed: rows of {source}")
    asked = [name for text in policy or [] for name in split_list(text)]
    if unknown := set(asked) - set(told["policy"]):
        there = ", ".join(told["policy"].unique(maintain_order=True))
        raise UserError(f"--policy has '{min(unknown)}', which no row of --shifts is of; allowed: {there}")
    own = told.filter(pl.col("policy").is_in(asked)) if asked else told
    found = fit(traces, own, truth)
    found.write(out)
    print(
        f"{found.model}: {counted(found.n_rows, 'cell')} of {len(found.policies)} policies on "
        f"{counted(len(found.text_ids), 'text')}"
    )
    factor = exp(1.96 * found.spread)
    print(
        f"divergence = {exp(found.intercept):.3f} x shift^{found.slope:.3f}, for shifts from "
        f"{found.least:.4f} to {found.most:.3f}; 95% of fitted cells within a factor of {factor:.2f}"
    )
    print(f"wrote {out}")
