"""What a search found, for the page: what held on traces that it did not choose on, and its front."""

from __future__ import annotations

import html
from pathlib import Path

from simulator.report.page import Section, paragraph
from simulator.report.tables import html_table
from simulator.results.metric_names import METRICS
from simulator.results.store import read_table
from simulator.results.terminal import format_bytes
from simulator.search.verdict import FRONT_SCHEMA, VERDICT_SCHEMA
from traces.documents import read_json
from traces.wording import number, span

_VERDICTS, _FRONT, _WINNERS = "verdicts.parquet", "front.parquet", "winners.json"


def is_search(path: Path) -> bool:
    """Say whether a search came to its end in a folder."""
    return (path / _VERDICTS).is_file()


def held_out_rows(path: Path) -> Path:
    """Give the file of rows that a search's policies were judged by."""
    return path / "held-out.parquet"


def search_section(path: Path) -> Section:
    """Tabulate the verdicts and the front of a search's folder.

    Raises
    ------
    UserError
        If a table is damaged or of another kind.
    """
    verdicts = read_table(path / _VERDICTS, str(path / _VERDICTS), VERDICT_SCHEMA)
    front = read_table(path / _FRONT, str(path / _FRONT), FRONT_SCHEMA)
    winners = read_json(path / _WINNERS, str(path / _WINNERS), list[dict[str, str | float | int | None]])
    metric = next((str(own["metric"]) for own in winners if own.get("metric") in METRICS), None)
    name = "the number searched by" if metric is None else f"{METRICS[metric].label} ({metric})"
    judged = [
        [
            html.escape(row["policy"]),
            html.escape(row["budget"]),
            html.escape(row["role"]),
            number(row["searched"], 4),
            number(row["held_out"], 4),
            f"{number(row['difference'], 4)} ({span(row['difference_low'], row['difference_high'], 4)})",
            "-" if row["memory_to_base"] is None else f"{row['memory_to_base']:+.1%}",
            html.escape(row["verdict"] or ""),
        ]
        for row in verdicts.iter_rows(named=True)
    ]
    head = ["policy", "budget", "role", "searched", "held out", "less base (95%)", "memory", "verdict"]
    tables = html_table(head, judged, caption="Judged on traces that had no part in the choice")
    lines = [
        [
            html.escape(row["policy"]),
            html.escape(row["budget"]),
            number(row["metric"], 4),
            format_bytes(row["bytes_mean"]),
        ]
        for row in front.sort("bytes_mean").iter_rows(named=True)
    ]
    tables += (
        f"<details><summary>The front: {len(front)} policies that none betters in number and memory</summary>"
        + html_table(["policy", "budget", "searched", "memory"], lines)
        + "</details>"
    )
    told = paragraph(
        f"Policies searched by {name}; of the runners-up, the first by chance is among them. "
        "Winners are confirmed by decoding: sim validate live --configs winners.json.",
        "note",
    )
    return Section("What the search found", [], told + tables)
