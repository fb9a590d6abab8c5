"""Tables as wide as a terminal: numbers are always whole, names and columns give way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TextIO

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Characters of a policy's name in a table that it would make too wide; the second where that is not enough.
_LONG, _SHORT = 36, 20


def plain_console(width: int, file: TextIO | None = None) -> Console:
    """Return a console as wide as the terminal, else ``width``, that shows text as it is."""
    asked = None if file is None and sys.stdout.isatty() else width
    return Console(width=asked, file=file, markup=False, emoji=False, highlight=False)


def empty_table(
    columns: Iterable[str],
    words: Collection[str] = ("policy",),
    *,
    as_markdown: bool = False,
    collapse_padding: bool = False,
) -> Table:
    """Make an empty table of columns of numbers, and of words where ``words`` names them."""
    box = MARKDOWN if as_markdown else SIMPLE_HEAD
    table = Table(box=box, header_style="bold", pad_edge=as_markdown, collapse_padding=collapse_padding)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def fitted(
    console: Console,
    make: Callable[[Sequence[str], Mapping[str, str]], Table],
    columns: Sequence[str],
    policies: Iterable[str],
    expendable: Sequence[str] = (),
) -> tuple[Table, str, list[str]]:
    """Make a table that is no wider than the console, if there is one.

    ``make`` makes the table of some columns, with shorter names by policy. A narrow console leaves out
    ``expendable`` columns, first to last.

    Returns
    -------
    Table
    str
        A sentence on what was left out, empty if nothing was.
    list of str
        Whole names of what was shortened, a line each.
    """
    policies, kept = list(dict.fromkeys(policies)), list(columns)
    waiting = [name for name in expendable if name in kept]
    names, legend = short_names(policies, None)
    shown = make(kept, names)
    for longest in (_LONG, _SHORT):
        if _fits(console, shown):
            break
        names, legend = short_names(policies, longest)
        shown = make(kept, names)
        while waiting and not _fits(console, shown):
            kept.remove(waiting.pop(0))
            shown = make(kept, names)
    left_out = [name.replace("_", " ") for name in expendable if name in columns and name not in kept]
    note = f"The terminal is too narrow for {', '.join(left_out)}; --format csv has all columns."
    return shown, note if left_out else "", legend


def short_names(policies: Iterable[str], longest: int | None = _LONG) -> tuple[dict[str, str], list[str]]:
    """Shorten names of more than ``longest`` characters; give a name for each, and lines that tell them."""
    names: dict[str, str] = {}
    legend: list[str] = []
    for name in policies:
        names[name] = name
        if longest is not None and len(name) > longest:
            mark = f"[{len(legend) + 1}]"
            names[name] = f"{name.partition(':')[0][: longest - 1 - len(mark)]} {mark}"
            legend.append(f"{mark} {name}")
    return names, legend


def _fits(console: Console, shown: Table) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return Measurement.get(console, unbounded, shown).maximum <= console.width


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
