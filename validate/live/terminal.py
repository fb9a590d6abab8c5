"""How accuracy and fidelity look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from simulator.results.labels import row_budget
from simulator.results.layout import fitted
from simulator.results.terminal import format_bytes, say
from traces.wording import counted, number, span

# Of accuracies and of published numbers, column to what it says of a row.
_ACCURACY: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": lambda row: f"{row['accuracy']:.3f}",
    "95%": lambda row: f"{row['low']:.3f} to {row['high']:.3f}",
    "answered": lambda row: f"{row['answered']:.3f}",
    "looping": lambda row: f"{row['looping']:.3f}",
    "tokens": lambda row: f"{row['tokens']:.0f}",
    "diverges at": lambda row: "-" if row["diverged_at"] is None else f"{row['diverged_at']:.0f}",
    "peak": lambda row: format_bytes(row["bytes_peak"]),
}
_PUBLISHED = ("ours", "95%", "published", "ours - published", "95% of it")
# What a narrow terminal leaves out, first to last.
_EXPENDABLE = ("tokens", "diverges at", "looping", "answered", "95% of it")


def print_accuracy(console: Console, accuracy: pl.DataFrame, note: str = "") -> None:
    """Print accuracy per family and budget, one row per policy, and a note."""
    for (family,), rows in accuracy.group_by("family", maintain_order=True):
        title = f"{family or 'problems'}: {counted(max(rows['n_problems']), 'problem')}"
        ordered = rows.sort("budget_asked", nulls_last=False, maintain_order=True).to_dicts()
        texts = [{name: tell(row) for name, tell in _ACCURACY.items()} for row in ordered]
        _print_fitted(console, title, list(_ACCURACY), ordered, texts)
    say(console, note)


def print_published(console: Console, table: pl.DataFrame, source: str, note: str) -> None:
    """Print accuracy beside published numbers, in percent; rows of `beside_published`."""
    marks: dict[str, str] = {}
    for (model, benchmark), rows in table.group_by("model", "benchmark", maintain_order=True):
        first = rows.row(0, named=True)
        each = "1 text" if first["n_samples"] == 1 else f"{first['n_samples']} texts"
        problems = f"{counted(first['n_problems'], 'problem')}, {each} each"
        title = f"{benchmark}, {model}: {problems}, pass@1 in percent"
        texts = [dict(zip(_PUBLISHED, published_text(row, marks), strict=True)) for row in rows.to_dicts()]
        _print_fitted(console, title, _PUBLISHED, rows.to_dicts(), texts)
    say(console, *(f"{mark} {text}" for text, mark in marks.items()))
    say(console, f"published: {source}" if source and table["published"].count() else "", note)


def _print_fitted(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: list[dict[str, Any]],
    texts: list[dict[str, str]],
) -> None:
    """Print a row per policy, by budget, and below it the names that were too long for it."""

    def make(shown_columns: Sequence[str], names: Mapping[str, str]) -> Table:
        table, last = _table(title), None
        for name in shown_columns:
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        for row, told in zip(rows, texts, strict=True):
            budget = row_budget(row)
            told = told | {"budget": "" if budget == last else budget, "policy": names[row["policy"]]}
            table.add_row(*(told[name] for name in shown_columns))
            last = budget
        return table

    policies = [row["policy"] for row in rows]
    table, left_out, legend = fitted(console, make, ["budget", "policy", *columns], policies, _EXPENDABLE)
    console.print(table)
    say(console, left_out, *legend)


def published_text(row: dict[str, Any], marks: dict[str, str]) -> tuple[str, ...]:
    """Write a row's accuracy, what was published and the difference, in percent; ``-`` where nothing was.

    A published number with a note gets a mark, kept in ``marks`` by the note's text.
    """
    ours = f"{100 * row['accuracy']:.2f}", f"{100 * row['low']:.2f} to {100 * row['high']:.2f}"
    if row["published"] is None:
        return (*ours, "-", "-", "-")
    mark = marks.setdefault(row["note"], "*" * (len(marks) + 1)) if row["note"] else ""
    return (
        *ours,
        f"{100 * row['published']:.2f}{mark}",
        f"{100 * row['difference']:+.2f}",
        f"{100 * row['difference_low']:+.2f} to {100 * row['difference_high']:+.2f}",
    )


def print_fidelity(console: Console, fidelity: pl.DataFrame) -> None:
    """Print how well each metric of the simulator predicts live accuracy."""
    for (family,), rows in fidelity.group_by("family", maintain_order=True):
        first = rows.row(0, named=True)
        table = _table(
            f"{family or 'problems'}: what predicts accuracy, {counted(first['n_cells'], 'cell')} of "
            f"{counted(first['n_problems'], 'problem')}, {counted(first['n_traces'], 'trace')}"
        )
        for name in ("metric", "Spearman", "95%", "within a budget", "95%", "regret", "at most"):
            table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
        for row in rows.sort("spearman_within", descending=True).iter_rows(named=True):
            table.add_row(
                row["metric"],
                number(row["spearman"], 3),
                span(row["spearman_low"], row["spearman_high"], 3),
                number(row["spearman_within"], 3),
                span(row["spearman_within_low"], row["spearman_within_high"], 3),
                number(row["regret"], 3),
                number(row["regret_most"], 3),
            )
        console.print(table)


def _table(title: str | None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        title_style="bold",
    )
