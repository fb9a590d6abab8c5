"""The cells that a page shows one at a time: a trace, a policy and a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from simulator.report.figure import Figure
from simulator.report.heads import head_figures, head_summary
from simulator.report.tokens import kept_tokens, token_pieces
from simulator.results.labels import with_budget_label
from traces.trace import Trace

KEY = ("trace_id", "policy", "budget")
# More would make the page slow to open.
MOST_CELLS = 12


@dataclass(frozen=True, slots=True, eq=False)
class CellPanel:
    """The page's part on one cell, under a name that is unique in the page and a title for the chooser.

    ``figures`` are of its trajectory, empty without one; ``kept`` is ``KeptTokens.encoded`` with the trace it
    is of, None where no text was given.
    """

    name: str
    title: str
    figures: list[Figure]
    kept: dict[str, Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """All cells of a page, and how many did not fit.

    ``texts`` are by trace: ``pieces`` of text, and ``prompt``, the number of its first tokens.
    """

    panels: list[CellPanel]
    texts: dict[str, dict[str, Any]]
    n_left_out: int


def cell_panels(
    trajectory: pl.DataFrame | None, retained: pl.DataFrame | None, traces: Sequence[Trace]
) -> Cells:
    """Make the panels of the cells in trajectory or retained rows, with the text of traces that are given.

    In both tables policies are told apart by name.
    """
    trajectory, retained = (
        None if table is None else with_budget_label(table) for table in (trajectory, retained)
    )
    by_id = {trace.trace_id: trace for trace in traces}
    # What never compressed has neither budgets nor anything that was not kept.
    tables = [
        table.drop_nulls("compression").select(KEY) for table in (trajectory, retained) if table is not None
    ]
    if not tables:
        return Cells([], {}, 0)
    keys = pl.concat(tables).unique(maintain_order=True).rows()
    # One trace's cells before the next one's, and one budget's: what fits then compares policies. A trace
    # whose text is there goes first.
    traces_met, budgets = (list(dict.fromkeys(key[column] for key in keys)) for column in (0, 2))
    traces_met.sort(key=lambda trace_id: trace_id not in by_id)
    keys.sort(key=lambda key: (traces_met.index(key[0]), budgets.index(key[2])))
    shown = keys[:MOST_CELLS]
    names = {trace.trace_id: trace.path.stem for trace in traces}
    if trajectory is not None:
        told = trajectory.select("trace_id", "trace").unique().rows()
        names |= {trace_id: name.removesuffix(".kvtrace") for trace_id, name in told}
    trajectories = {key: own for key in shown if (own := _rows_of(trajectory, key)) is not None}
    ranges = _shared_ranges(list(trajectories.values()))
    panels = []
    for number, key in enumerate(shown):
        trace_id, policy, budget = key
        title = f"{policy} at {budget}, {names.get(trace_id, trace_id[:12])}"
        name = f"cell-{number}"
        figures = head_figures(name, title, trajectories[key], *ranges) if key in trajectories else []
        kept = None
        if trace_id in by_id and (own := _rows_of(retained, key)) is not None:
            kept = kept_tokens(own, by_id[trace_id]).encoded() | {"text": trace_id}
        panels.append(CellPanel(name, title, figures, kept))
    texts = {
        trace_id: {"pieces": token_pieces(by_id[trace_id]), "prompt": by_id[trace_id].prompt_tokens}
        for trace_id in dict.fromkeys(panel.kept["text"] for panel in panels if panel.kept)
    }
    return Cells(panels, texts, len(keys) - len(shown))


def _rows_of(table: pl.DataFrame | None, key: tuple[str, ...]) -> pl.DataFrame | None:
    """Return the rows of a cell, None if there are none."""
    own = None if table is None else table.filter(**dict(zip(KEY, key, strict=True)))
    return None if own is None or own.is_empty() else own


def _shared_ranges(trajectories: list[pl.DataFrame]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Give the ranges of mass and of budgets over all cells, so that their shades compare."""
    if not trajectories:
        return (0.0, 1.0), (0.0, 1.0)
    summaries = pl.concat([head_summary(own) for own in trajectories])
    return _range(summaries["mass"]), _range(summaries["budget"])


def _range(values: pl.Series) -> tuple[float, float]:
    found = values.drop_nulls().to_list()
    return (float(min(found)), float(max(found))) if found else (0.0, 1.0)
