"""What a search found, for the page: what held on traces that it did not choose on, and its front."""

from __future__ import annotations

from pathlib import Path

from simulator.report.page import Section
from simulator.results.metric_names import COMPARED
from simulator.results.store import read_table
from simulator.search.verdict import FRONT_SCHEMA, VERDICT_SCHEMA
from traces.documents import read_json

_VERDICTS, _FRONT, _WINNERS = "verdicts.parquet", "front.parquet", "winners.json"


def is_search(path: Path) -> bool:
    """Say whether a search came to its end in a folder."""
    return (path / _VERDICTS).is_file()


def held_out_rows(path: Path) -> Path:
    """Give the file of rows that a search's policies were judged by."""
    return path / "held-out.parquet"


def search_section(path: Path) -> Section:
    """Tabulate a search's verdicts and front; raises UserError if a table is damaged or of another kind."""
    verdicts = read_table(path / _VERDICTS, str(path / _VERDICTS), VERDICT_SCHEMA)
    front = read_table(path / _FRONT, str(path / _FRONT), FRONT_SCHEMA)
    winners = read_json(path / _WINNERS, str(path / _WINNERS), list[dict[str, str | float | int | None]])
    metric = next((str(own["metric"]) for own in winners if own.get("metric") in COMPARED), None)
    name = "the number searched by" if metric is None else f"{COMPARED[metric].label} ({metric})"
    values = {"metric": name, "verdicts": verdicts.to_dicts(), "front": front.sort("bytes_mean").to_dicts()}
    return Section("What the search found", "search.html", values)
