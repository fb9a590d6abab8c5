"""How progress looks, for every verb."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def shows_progress(quiet: bool) -> bool:
    """Tell whether somebody sees it."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def progress(doing: str, total: float | None, quiet: bool) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal while ``doing``.

    Gives what advances it by one of ``total``. Given changes, as rich's ``Progress.update`` takes them, it
    makes these instead; ``told`` is what stands behind the bar.
    """
    if not shows_progress(quiet):
        yield lambda **_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[told]}", markup=False)),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total, told="")
        yield lambda **changes: bar.update(task, **(changes or {"advance": 1}))
