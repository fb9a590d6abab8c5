"""Puts a page together: its sections in order, and what it has no data for."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from simulator.charts.style import METRIC_NAMES, ordered_policies
from simulator.report.cells import Cells, cell_panels
from simulator.report.page import Report, Section, origin, page
from simulator.report.quality import crowded, has_intervals, quality_figures, quality_rows
from simulator.report.sources import Sources
from simulator.report.tables import means_table, standings_table, verdict, what_was_replayed
from simulator.results.metric_names import MEASURED, asked_metric, fidelity_note, why_missing
from simulator.results.tables import usual_metric
from traces.errors import UserError
from traces.trace import Trace

TITLE = "KV budgets: what was kept and what it cost"


def report(
    sources: Sources,
    metrics: Sequence[str] = (),
    traces: Sequence[Trace] = (),
    fidelity: Section | None = None,
    seed: int = 0,
    searched: Section | None = None,
    made_by: str = "",
) -> Report:
    """Make the page of a replay.

    Parameters
    ----------
    sources : Sources
    metrics : sequence of str
        Columns that count as quality; `usual_metric` by default.
    traces : sequence of Trace
        Whose text is shown; needed for retained rows.
    fidelity : Section, optional
        How well the numbers predict accuracy.
    seed : int
        Of the bootstrap over traces.
    searched : Section, optional
        What a search found.
    made_by : str
        The command, told at the end of the page with the date and the code of the rows.

    Raises
    ------
    UserError
        For an unknown metric, one that the rows lack, or rows without a policy that evicted.
    """
    rows = sources.rows
    found = {metric: quality_rows(rows, metric, seed) for metric in known_metrics(rows, metrics)}
    if any(own.is_empty() for own in found.values()):
        raise UserError("no row is of a policy that evicted; nothing to compare")
    cells = cell_panels(sources.trajectory, sources.retained, traces)
    absent = _absent(sources, cells, fidelity)
    sections = [
        _summary(rows, found),
        _quality(found, ordered_policies(rows["policy"].to_list())),
        searched,
        fidelity,
        _one_at_a_time(cells) if cells.panels else None,
        Section("All policies and budgets", "means.html", means_table(rows)),
        Section("Not in this page", "absent.html", {"absent": absent}) if absent else None,
    ]
    kept = {panel.name: panel.kept for panel in cells.panels if panel.kept}
    shown = [section for section in sections if section is not None]
    return page(TITLE, shown, origin(rows, made_by), kept=kept, texts=cells.texts)


def known_metrics(rows: pl.DataFrame, asked: Sequence[str]) -> list[str]:
    """Return the metrics that were asked, once each; without any, `usual_metric`.

    Raises UserError for an unknown metric, or one that rows lack.
    """
    asked = [asked_metric(name) for name in asked]
    for metric in asked:
        if metric not in rows.columns:
            writer = "sim validate masked or forced" if metric in MEASURED else "a version that writes it"
            raise UserError(f"the rows have no column '{metric}'; allowed: rows of {writer}")
        empty = rows.filter((pl.col("status") == "ok") & pl.col(metric).is_null())
        if len(empty):
            raise UserError(
                f"{metric} is empty in {len(empty)} rows, as it is {why_missing(metric)}; "
                "allowed: a metric that all rows have"
            )
    return list(dict.fromkeys(asked)) or [usual_metric(rows.filter(pl.col("status") == "ok"))]


def _summary(rows: pl.DataFrame, found: dict[str, pl.DataFrame]) -> Section:
    models, policies = rows["model"].drop_nulls(), rows["policy"]
    metrics = [
        {
            "name": METRIC_NAMES[metric],
            "verdict": verdict(own, metric),
            "trust": fidelity_note(metric, models, policies),
            "budgets": own["budget"].unique(maintain_order=True).to_list(),
            "standings": standings_table(own, metric),
        }
        for metric, own in found.items()
    ]
    several = any(map(has_intervals, found.values()))
    values = {"replayed": what_was_replayed(rows), "metrics": metrics, "several": several}
    return Section("What was replayed, and how policies compare", "summary.html", values)


def _quality(found: dict[str, pl.DataFrame], policies: list[str]) -> Section:
    figures = [quality_figures(own, metric, policies) for metric, own in found.items()]
    # Row by row: all metrics against memory, then all against budget.
    ordered = [own[i] for i in range(2) for own in figures]
    return Section(
        "What memory buys", "quality.html", {"crowded": any(map(crowded, found.values()))}, ordered
    )


def _one_at_a_time(cells: Cells) -> Section:
    figures = [figure for panel in cells.panels for figure in panel.figures]
    values = {"panels": cells.panels, "n_left_out": cells.n_left_out}
    return Section("One policy at a time", "cells.html", values, figures)


def _absent(sources: Sources, cells: Cells, fidelity: Section | None) -> list[str]:
    """Name what the page has no data for, as its template does."""
    missing = {
        "trajectory": sources.trajectory is None,
        "retained": sources.retained is None,
        "text": sources.retained is not None and not any(panel.kept for panel in cells.panels),
        "fidelity": fidelity is None,
    }
    return [name for name, is_missing in missing.items() if is_missing]
