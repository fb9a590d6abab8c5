"""Tables leave here: to the terminal, to standard output as text, or to a file in one atomic step."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from simulator.results import summarise
from traces.atomic import write_file
from traces.errors import UserError

FORMATS = ("table", "csv", "json", "parquet")
_SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".txt": "table"}


def require_place(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises
    ------
    UserError
        If its folder is missing or it is a folder itself.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: folder {path.parent} is missing; allowed: an existing folder")
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder is there; allowed: a file")


def choose_format(asked: str | None, path: Path | None) -> str:
    """Settle the format: what was asked, else the file's suffix, else a table.

    Raises
    ------
    UserError
        For an unknown format or suffix, or parquet without a file.
    """
    require_place(path, "-o")
    if asked is not None and asked not in FORMATS:
        raise UserError(f"--format is '{asked}'; allowed: {', '.join(FORMATS)}")
    if asked is None and path is not None:
        if path.suffix not in _SUFFIXES:
            raise UserError(f"-o {path}: suffix tells no format; allowed: {', '.join(_SUFFIXES)} or --format")
        return _SUFFIXES[path.suffix]
    if asked == "parquet" and path is None:
        raise UserError("--format parquet is binary and needs a file; allowed: with -o FILE.parquet")
    return asked or "table"


def write_rows(table: pl.DataFrame, path: Path | None, chosen: str) -> None:
    """Write full rows, or for ``table`` the readable summary, to a file or standard output."""
    if path is None:
        if chosen == "table":
            print_results(table, Console(width=None if sys.stdout.isatty() else 160))
        else:
            sys.stdout.write(_text(table, chosen))
        return
    if chosen == "parquet":
        write_parquet(table, path)
    else:
        text = _rendered(table) if chosen == "table" else _text(table, chosen)
        write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Write a table as Parquet; a reader never sees half a file."""
    write_file(path, table.write_parquet)


def print_results(table: pl.DataFrame, console: Console) -> None:
    """Print results grouped by budget: one row per policy, averaged over traces if there are several."""
    summary = summarise(table)
    if summary.is_empty():
        return
    several = table["trace_id"].n_unique() > 1
    shared = _shared_parameters(summary.to_dicts())
    units = dict.fromkeys(zip(summary["budget_asked"], summary["budget_unit"], strict=True))
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    shown.add_column("\nbudget", justify="right", no_wrap=True)
    shown.add_column("\npolicy", no_wrap=True)
    headers = ["entries\nmean", "\npeak", "memory\nmean", "\npeak", "\nmass", "\n±95%", "\np05"]
    headers += ["worst\nhead", "miss\nrate", "\noracle", "\ngap", "behind\nbest"]
    if not several:
        headers = [header for header in headers if header not in ("\n±95%", "behind\nbest")]
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    for amount, unit in units:
        group = summary.filter(pl.col("budget_asked") == amount, pl.col("budget_unit") == unit)
        label = f"{amount:g}" + ("" if unit == "entries" else unit)
        for number, row in enumerate(group.iter_rows(named=True)):
            cells = [label if number == 0 else "", _policy_label(row, shared), *_cells(row, several)]
            shown.add_row(*cells, end_section=number == len(group) - 1)
    console.print(_caption(table, several, shared))
    console.print(shown)


def _caption(table: pl.DataFrame, several: bool, shared: dict[str, Any]) -> str:
    models = ", ".join(sorted(set(table["model"])))
    done = table.filter(pl.col("status") == "ok")
    steps = int(done.unique("trace_id")["n_steps"].sum())
    named = f"{done['trace_id'].n_unique()} traces" if several else table["trace"][0]
    told = "".join(f", {name} {value}" for name, value in shared.items())
    lines = [
        f"{named} of {models}: {steps:,} decode steps{told}. Budgets are per KV head after a compression;",
        "mass is the full cache's attention on what was retained, oracle the most that memory could hold.",
    ]
    if several:
        lines.append("Intervals are bootstrapped over traces; noise: the paired interval holds 0.")
        if len(done) < len(table):
            lines.append(
                "Some cells failed: a budget's rows average the traces that all its policies replayed."
            )
    return "\n".join(lines)


def _cells(row: dict[str, Any], several: bool) -> list[str]:
    halfwidth = (row["mass_high"] - row["mass_low"]) / 2
    interval = [f"{halfwidth:.4f}" if row["n_traces"] > 1 else ""] if several else []
    return [
        f"{row['entries_mean']:.1f}",
        f"{row['entries_peak']:.1f}",
        format_bytes(row["bytes_mean"]),
        format_bytes(row["bytes_peak"]),
        f"{row['mass_mean']:.4f}",
        *interval,
        f"{row['mass_p05']:.4f}",
        f"{row['mass_min_head']:.4f}",
        f"{row['miss_rate']:.4f}",
        f"{row['oracle_mass']:.4f}",
        f"{max(0.0, row['gap']):.4f}",
        *([_behind(row)] if several else []),
    ]


def _behind(row: dict[str, Any]) -> str:
    if row["behind"] is None:
        return "best" if row["is_best"] else ""
    # Policies are compared at equal memory: say where that does not hold.
    memory = f" {row['memory_to_best']:+.0%} mem" if abs(row["memory_to_best"]) > 0.01 else ""
    noise = " noise" if row["behind_low"] <= 0 <= row["behind_high"] else ""
    return f"{row['behind']:.4f}{noise}{memory}"


def _changed_parameters(row: dict[str, Any]) -> dict[str, Any]:
    from simulator.policy import parse_policy

    given = json.loads(row["policy_params"])
    usual = parse_policy(row["policy"]).parameters["trigger"]
    defaults = parse_policy(f"{row['policy']}:trigger={given['trigger']}").parameters | {"trigger": usual}
    return {name: value for name, value in given.items() if defaults[name] != value}


def _shared_parameters(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Find changed parameters on which several policies agree and none differs: the caption tells those."""
    given = [json.loads(params) for _, params in {(row["policy"], row["policy_params"]) for row in rows}]
    candidates = sorted({name for row in rows for name in _changed_parameters(row)})
    values = {name: [params[name] for params in given if name in params] for name in candidates}
    return {
        name: found[0]
        for name, found in values.items()
        if len(found) > 1 and all(value == found[0] for value in found)
    }


def _policy_label(row: dict[str, Any], shared: dict[str, Any]) -> str:
    own = {name: value for name, value in _changed_parameters(row).items() if name not in shared}
    listed = ",".join(f"{name}={value}" for name, value in own.items())
    return f"{row['policy']}:{listed}" if listed else str(row["policy"])


def format_bytes(count: float) -> str:
    """Write a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _rendered(table: pl.DataFrame) -> str:
    text = StringIO()
    print_results(table, Console(width=160, file=text))
    return text.getvalue()


def _text(table: pl.DataFrame, chosen: str) -> str:
    if chosen == "csv":
        return table.write_csv()
    rows = table.to_dicts()
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
