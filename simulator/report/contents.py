"""Puts a page together: its sections in order, and what it has no data for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from simulator.charts.style import ordered_policies
from simulator.report.cells import Cells, cell_panels
from simulator.report.figure import Figure
from simulator.report.page import Section, page, paragraph
from simulator.report.quality import crowded, has_intervals, quality_figures, quality_rows
from simulator.report.sources import Sources
from simulator.report.tables import means_table, standings_table, verdict, what_was_replayed
from simulator.results.metric_names import asked_metric, fidelity_note
from simulator.results.tables import usual_metric
from traces.errors import UserError
from traces.trace import Trace
from traces.version import package_version

TITLE = "KV budgets: what was kept and what it cost"


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """A page and its charts.

    Attributes
    ----------
    text : str
        The HTML.
    figures : list of Figure
    """

    text: str
    figures: list[Figure]


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
    everyone = ordered_policies(rows["policy"].to_list())
    sections = [_summary(sources, found), _quality(found, everyone)]
    sections += [section for section in (searched, fidelity) if section is not None]
    absent = _absent(sources, cells, fidelity)
    text = page(TITLE, sections, cells, absent, means_table(rows), _origin(rows, made_by))
    figures = [figure for section in sections for figure in section.figures]
    return Report(text, [*figures, *(figure for panel in cells.panels for figure in panel.figures)])


def known_metrics(rows: pl.DataFrame, asked: Sequence[str]) -> list[str]:
    """Give the metrics that were asked, once each; without any, `usual_metric`.

    Raises
    ------
    UserError
        For an unknown metric, or one that rows lack.
    """
    asked = [asked_metric(name) for name in asked]
    for metric in asked:
        if metric not in rows.columns:
            raise UserError(f"the rows have no column '{metric}'; allowed: rows of a version that writes it")
        empty = rows.filter((pl.col("status") == "ok") & pl.col(metric).is_null())
        if len(empty):
            raise UserError(
                f"{metric} is empty in {len(empty)} rows, of which only a sample was measured; "
                "allowed: a metric that all rows have"
            )
    return list(dict.fromkeys(asked)) or [usual_metric(rows.filter(pl.col("status") == "ok"))]


def _summary(sources: Sources, found: dict[str, pl.DataFrame]) -> Section:
    words = [paragraph(what_was_replayed(sources.rows))]
    models, policies = sources.rows["model"].drop_nulls(), sources.rows["policy"]
    for metric, own in found.items():
        words.append(paragraph(verdict(own, metric)))
        words.append(paragraph(fidelity_note(metric, models, policies), "note"))
    tables = "".join(standings_table(own, metric) for metric, own in found.items())
    several = any(map(has_intervals, found.values()))
    marks = "Bold is first at its budget" + (
        "; = is not told apart from it: the 95% interval of the paired difference over traces holds 0."
        if several
        else "."
    )
    return Section(
        "What was replayed, and how policies compare",
        [],
        "".join(words) + f'<div class="grid tables">{tables}</div>' + paragraph(marks, "note"),
    )


def _origin(rows: pl.DataFrame, made_by: str) -> str:
    """Say what made the page, when, and which code the rows are of."""
    codes = (
        rows["code_version"].drop_nulls().unique().sort().to_list() if "code_version" in rows.columns else []
    )
    told = [f"Made on {datetime.now(UTC):%Y-%m-%d} by kvbudget {package_version()}"]
    told += [f"from rows of code {', '.join(codes)}"] if codes else []
    return f"{' '.join(told)}." + (f" Command: {made_by}" if made_by else "")


def _quality(found: dict[str, pl.DataFrame], policies: list[str]) -> Section:
    figures = [quality_figures(own, metric, policies) for metric, own in found.items()]
    # Row by row: all metrics against memory, then all against budget.
    ordered = [own[i] for i in range(2) for own in figures]
    hint = (
        "Point at a mark to see its policy alone; click or tap one in a legend to keep it so, with Shift "
        "several, and double click brings all back."
    )
    if any(map(crowded, found.values())):
        hint += " Of so many policies only the leading ones stand out at first."
    return Section("What memory buys", ordered, paragraph(hint, "note"))


def _absent(sources: Sources, cells: Cells, fidelity: Section | None) -> list[str]:
    words = []
    if sources.trajectory is None:
        words.append(
            "Maps of mass and budgets over layers and heads, and head budgets over time: "
            "sim replay --trajectory FILE.parquet, then sim report --trajectory FILE.parquet."
        )
    if sources.retained is None:
        words.append(
            "Which tokens were kept: sim replay --retained FILE.parquet, then "
            "sim report --retained FILE.parquet --trace TRACE."
        )
    elif not any(panel.kept for panel in cells.panels):
        words.append("Which tokens were kept: none of the traces given is one of the retained rows'.")
    if fidelity is None:
        words.append(
            "Accuracy against the simulator's numbers: --fidelity and --accuracy, the tables of sim validate."
        )
    return words
