"""How a search's end looks on a terminal."""

from __future__ import annotations

import polars as pl
from rich.console import Console

from simulator.results.layout import empty_table, plain_console
from simulator.results.metric_names import COMPARED
from simulator.results.terminal import format_bytes, say
from simulator.search.study import Question
from traces.wording import counted

# Of the front; a search of minutes finds dozens.
_MOST_ROWS = 12


def print_search(
    front: pl.DataFrame,
    verdicts: pl.DataFrame,
    question: Question,
    counts: dict[str, int],
    n_traces: int,
    console: Console | None = None,
) -> None:
    """Print the front on the search's own traces, and the verdict of the held-out ones."""
    console = console or plain_console(160)
    better = "more" if COMPARED[question.metric].more_is_better else "less"
    fixed = "".join(f", {name} {value}" for name, value in question.space.fixed.items())
    say(
        console,
        f"{counts['judged']} policies judged by {question.metric} ({better} is better), {counts['whole']} of "
        f"them on all {counted(n_traces, 'trace')}{fixed}; {counts['failed']} failed or were cut off.\n"
        f"The front: no other policy of the search is better in both metric and memory{_thinned(front)}.",
    )
    shown = empty_table(("memory", "budget", "metric"))
    shown.add_column("policy", overflow="fold")
    for row in front.gather(_spread(len(front))).iter_rows(named=True):
        shown.add_row(format_bytes(row["bytes_mean"]), row["budget"], f"{row['metric']:.5f}", row["policy"])
    console.print(shown)
    say(
        console,
        f"On {max(verdicts['n_traces'].to_list())} held-out traces, against {question.base}, trace by trace. "
        "The winner was chosen before; its interval tells.\n"
        "Of the runners-up, the best by chance is among them.",
    )
    numbers = ("searched", "held out", "difference", "95% interval", "memory")
    shown = empty_table(("budget", "", *numbers, "verdict"), ("", "verdict"))
    shown.add_column("policy", overflow="fold")
    for row in verdicts.iter_rows(named=True):
        told = dict.fromkeys(numbers, "") | {"searched": f"{row['searched']:.5f}"}
        is_base, has_failed = row["role"] == "base", row["held_out"] is None
        if not has_failed:
            told["held out"] = f"{row['held_out']:.5f}"
        if not (has_failed or is_base):
            told["difference"] = f"{row['difference']:+.5f}"
            told["95% interval"] = f"{row['difference_low']:+.5f} to {row['difference_high']:+.5f}"
            told["memory"] = f"{row['memory_to_base']:+.1%}"
        budget = row["budget"] if is_base or has_failed else ""
        shown.add_row(budget, row["role"], *told.values(), row["verdict"], row["policy"])
    console.print(shown)


def _thinned(front: pl.DataFrame) -> str:
    return "" if len(front) <= _MOST_ROWS else f" ({_MOST_ROWS} of {len(front)}; front.parquet has all)"


def _spread(n: int) -> list[int]:
    """Choose rows evenly, the first and the last among them."""
    if n <= _MOST_ROWS:
        return list(range(n))
    return [round(i * (n - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)]
