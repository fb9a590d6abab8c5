"""Tables to be fuzzed: rows of a replay, a sweep's folder, parts of a live run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import mutations as change
import polars as pl
from fuzz_kind import Target, only_json

from traces.errors import UserError


def table_targets(folder: Path, trace: Path) -> list[Target]:
    import traces
    from simulator import replay
    from simulator.results.output import write_rows
    from simulator.sweep.rows import read_rows

    table = replay(traces.open_trace(trace), ["streamingllm:buffer=2", "random:buffer=2"], ["50%", 6])
    targets = []
    for suffix in ("parquet", "csv", "json"):
        path = folder / f"rows.{suffix}"
        write_rows(table, path, suffix)

        def meaning(place: Path) -> Any:
            rows = read_rows([place]).to_dicts()
            return _plain(rows) if place.suffix == ".parquet" else [*map(_told, rows)]

        before = meaning(path)
        expected = {"parquet": lambda _, before=before: before, "csv": _csv_rows, "json": _json_rows}[suffix]
        changed = change.changed_json if suffix == "json" else change.changed_bytes
        commands = [["results", str(path)]]
        targets.append(Target(f"rows.{suffix}", path, changed, meaning, expected, commands))
    return targets


def beside_targets(folder: Path, trace: Path) -> list[Target]:
    """Give the tables that a replay writes beside its rows, as a page reads them."""
    import traces
    from simulator.cells import run_replay
    from simulator.report.sources import read_parquet
    from simulator.results.output import write_parquet
    from simulator.results.tables import RETAINED_SCHEMA, TRAJECTORY_SCHEMA

    opened = traces.open_trace(trace)
    done = run_replay([opened], ["streamingllm:buffer=2"], [6], keep_retained=True, keep_trajectory=True)
    targets = []
    for name, table, schema, own in (
        ("trajectory", done.trajectory, TRAJECTORY_SCHEMA, None),
        ("retained", done.retained, RETAINED_SCHEMA, [opened]),
    ):
        path = folder / f"{name}.parquet"
        write_parquet(table, path)

        def meaning(place: Path, name=name, schema=schema, own=own) -> Any:
            return _plain(read_parquet(place, schema, f"--{name}", own).to_dicts())

        before = meaning(path)
        targets.append(Target(name, path, change.changed_bytes, meaning, lambda _, before=before: before))
    return targets


def sweep_folder_targets(folder: Path, trace: Path) -> list[Target]:
    from simulator.sweep.folder import SweepFolder
    from simulator.sweep.run import run_sweep
    from simulator.sweep.spec import read_spec

    spec, out = folder / "small.toml", folder / "swept"
    spec.write_text(
        f"traces = ['{trace}']\npolicies = ['streamingllm', 'random']\nbudgets = [6]\n"
        "parameters = { buffer = [2] }\n"
    )
    run_sweep(read_spec(spec), out)

    def meaning(_: Path) -> Any:
        rows = _plain(SweepFolder(out).table().to_dicts())
        if len(rows) < 2:
            raise UserError("a damaged part was left out")
        return rows

    before = meaning(out)
    commands = [["results", str(out)]]
    part = next((out / "parts").iterdir())
    return [
        Target("sweep part", part, change.changed_bytes, meaning, lambda _: before, commands),
        Target(
            "sweep plan", out / "cells.parquet", change.changed_bytes, meaning, lambda _: before, commands
        ),
    ]


def live_target(folder: Path) -> Target:
    from simulator.results.output import write_parquet
    from simulator.results.tables import budget_columns
    from validate.live.completions import ROW_SCHEMA
    from validate.live.matrix import FULL, Batch, Matrix, MatrixSettings

    prompts, out = folder / "live.jsonl", folder / "live"
    prompts.write_text('{"id": "p1", "prompt": "walk", "answer": "ka"}\n')
    Matrix(out, MatrixSettings(prompts=str(prompts)), 1)
    batch = Batch(FULL, None, 0, 1)
    samples: dict[Any, Any] = {pl.String: "x", pl.Boolean: True, pl.Float64: 0.5}
    row = {
        name: [3, 4] if isinstance(kind, pl.List) else samples.get(kind, 1)
        for name, kind in ROW_SCHEMA.items()
    }
    row |= {"policy": FULL.name, "policy_params": FULL.parameters_json} | budget_columns(None)
    write_parquet(pl.DataFrame([row], schema=ROW_SCHEMA), batch.path(out))

    def meaning(_: Path) -> Any:
        again = Matrix(out, MatrixSettings(prompts=str(prompts)), 1)
        if not again.is_done(batch):
            raise UserError("it is decoded again")
        return _plain(again.table([batch]).to_dicts())

    before = meaning(out)
    return Target("live part", batch.path(out), change.changed_bytes, meaning, lambda _: before)


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Give rows with the same text for the same numbers, NaN included."""
    return [{name: repr(value) for name, value in row.items()} for row in rows]


def _told(row: dict[str, Any]) -> tuple[Any, ...]:
    """Give what two readers of one text have to agree on."""
    names = ("trace_id", "policy", "budget_unit", "status")
    numbers = ("budget_asked", "mass_mean", "lost_lookup_peak", "n_evictions")
    return (
        *(row.get(name) or None for name in names),
        *(None if row.get(name) in (None, "") else float(row[name]) for name in numbers),
    )


def _csv_rows(content: bytes) -> Any:
    return [_told(row) for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))]


def _json_rows(content: bytes) -> Any:
    return [_told(row) for row in only_json(content)]
