"""How accuracy, fidelity and the levels look on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulator.naming import row_budget, told_apart, with_budget_label
from simulator.results import GROUP
from simulator.terminal import format_bytes
from traces.atomic import write_file
from traces.wording import counted, number, span

# Layers that fit into a line.
_WIDEST = 12
# A policy's name in a table; longer ones are told below it.
_LONGEST_NAME = 36


def print_accuracy(accuracy: pl.DataFrame, output: Path | None = None, note: str = "") -> None:
    """Print accuracy per family and budget, one row per policy, and a note, or write them as text."""
    tables: list[Table | Text] = []
    names, legend = short_names(accuracy["policy"])
    for (family,), rows in accuracy.group_by("family", maintain_order=True):
        table = _table(f"{family or 'problems'}: {counted(rows['n_problems'].max(), 'problem')}")
        for name in (
            "budget",
            "policy",
            "accuracy",
            "95%",
            "answered",
            "looping",
            "tokens",
            "diverges at",
            "peak",
        ):
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        last = None
        for row in rows.sort("budget_asked", nulls_last=False, maintain_order=True).iter_rows(named=True):
            budget = row_budget(row)
            diverged = row["diverged_at"]
            table.add_row(
                "" if budget == last else budget,
                names[row["policy"]],
                f"{row['accuracy']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                f"{row['answered']:.3f}",
                f"{row['looping']:.3f}",
                f"{row['tokens']:.0f}",
                "-" if diverged is None else f"{diverged:.0f}",
                format_bytes(row["bytes_peak"]),
            )
            last = budget
        tables.append(table)
    told = [*legend, note] if note else legend
    _show([*tables, Text("\n".join(told))] if told else tables, output)


def short_names(policies: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Shorten names that would take the room of numbers; give a name for each, and lines that tell them."""
    names, legend = {}, []
    for name in dict.fromkeys(policies):
        names[name] = name
        if len(name) > _LONGEST_NAME:
            names[name] = f"{name.partition(':')[0][: _LONGEST_NAME - 5]} [{len(legend) + 1}]"
            legend.append(f"[{len(legend) + 1}] {name}")
    return names, legend


def print_published(table: pl.DataFrame, source: str, note: str, output: Path | None = None) -> None:
    """Print accuracy beside published numbers, in percent, or write it; rows of `beside_published`."""
    shown: list[Table | Text] = []
    marks: dict[str, str] = {}
    names, legend = short_names(table["policy"])
    for (model, benchmark), rows in table.group_by("model", "benchmark", maintain_order=True):
        first = rows.row(0, named=True)
        each = "1 text" if first["n_samples"] == 1 else f"{first['n_samples']} texts"
        problems = f"{counted(first['n_problems'], 'problem')}, {each} each"
        lines = _table(f"{benchmark}, {model}: {problems}, pass@1 in percent")
        for name in ("budget", "policy", "ours", "95%", "published", "ours - published", "95%"):
            lines.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        last = None
        for row in rows.iter_rows(named=True):
            budget = row_budget(row)
            lines.add_row("" if budget == last else budget, names[row["policy"]], *published_text(row, marks))
            last = budget
        shown.append(lines)
    told = legend + [f"{mark} {text}" for text, mark in marks.items()]
    told += [f"published: {source}"] if source and table["published"].count() else []
    told += [note] if note else []
    _show([*shown, Text("\n".join(told))] if told else shown, output)


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


def print_fidelity(fidelity: pl.DataFrame) -> None:
    """Print how well each metric of the simulator predicts live accuracy."""
    tables = []
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
        tables.append(table)
    _show(tables, None)


def print_levels(table: pl.DataFrame, output: Path | None) -> None:
    """Print rows of the shadow or forced level, or write them as text."""
    (table,) = told_apart(table)
    labels = ["trace", "policy", "budget"]
    measured = [name for name in table.columns if name not in ("trace_id", "trace", *GROUP)]
    table = with_budget_label(table).select(*labels, *measured)
    shown = _table(None)
    shown.collapse_padding = True  # with a column per layer every space counts
    layers = [name for name in table.columns if name.startswith("drift_layer_")]
    if len(layers) > _WIDEST:
        table = table.drop(layers)  # a file has them
    for name in table.columns:
        side = "left" if table[name].dtype == pl.String else "right"
        header = name.replace("drift_layer_", "L").replace("_mass", "\nmass").replace("_", "\n")
        shown.add_column(header, justify=side, no_wrap=True)
    for row in table.iter_rows():
        shown.add_row(*map(_level_text, row))
    _show([shown], output)


def _level_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value).removesuffix(".kvtrace")


def _table(title: str | None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        title_style="bold",
    )


def _show(tables: Sequence[Table | Text], output: Path | None) -> None:
    if output is None:
        Console(width=None if sys.stdout.isatty() else 160).print(*tables)
        return

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            Console(file=file, width=200).print(*tables)

    write_file(output, write)
