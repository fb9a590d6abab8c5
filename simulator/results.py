"""The result tables: columns, types and summaries. The only file that builds a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from simulator.layer_replay import Retained

ROW_SCHEMA: dict[str, Any] = {
    "trace_id": pl.String,
    "model": pl.String,
    "policy": pl.String,
    "policy_params": pl.String,
    "budget_asked": pl.Float64,
    "budget_unit": pl.String,
    "entries_mean": pl.Float64,
    "entries_peak": pl.Float64,
    "bytes_mean": pl.Int64,
    "bytes_peak": pl.Int64,
    "mass_mean": pl.Float64,
    "mass_p05": pl.Float64,
    "mass_min_head": pl.Float64,
    "miss_rate": pl.Float64,
    "oracle_mass": pl.Float64,
    "gap": pl.Float64,
    "n_steps": pl.Int64,
    "n_evictions": pl.Int64,
    "seconds": pl.Float64,
    "code_version": pl.String,
    "status": pl.String,
    "error": pl.String,
    # Beyond the agreed columns:
    "trace": pl.String,
    "budget_entries": pl.Int64,
    "low_mass_rate": pl.Float64,
    "protection_binding": pl.Boolean,
}

RETAINED_SCHEMA: dict[str, Any] = {
    "trace_id": pl.String,
    "policy": pl.String,
    "policy_params": pl.String,
    "budget": pl.String,
    "layer": pl.Int32,
    "kv_head": pl.Int32,
    "compression": pl.Int32,
    "n_tokens": pl.Int32,
    "slot": pl.Int32,
    "position": pl.Int32,
}

_GROUP = ["policy", "policy_params", "budget_asked", "budget_unit"]


def result_table(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Build the table of results, one row per trace, policy and budget."""
    return pl.DataFrame(list(rows), schema=ROW_SCHEMA)


def retained_table(
    cells: Iterable[tuple[Mapping[str, str], Sequence[Retained]]],
) -> pl.DataFrame:
    """Build the table of who is retained after every compression, one row per slot.

    Parameters
    ----------
    cells : iterable of (labels, retained)
        Labels hold trace_id, policy, policy_params and budget.
    """
    frames = [pl.DataFrame(schema=RETAINED_SCHEMA)]
    for labels, retained in cells:
        if not retained:
            continue
        counts = [len(kept.positions) for kept in retained]
        columns: dict[str, Any] = {
            name: np.repeat(np.array([getattr(kept, name) for kept in retained], np.int32), counts)
            for name in ("layer", "kv_head", "compression", "n_tokens")
        }
        columns["slot"] = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        columns["position"] = np.concatenate([kept.positions for kept in retained])
        labelled = [pl.lit(value).alias(name) for name, value in labels.items()]
        frames.append(pl.DataFrame(columns).with_columns(labelled).select(list(RETAINED_SCHEMA)))
    return pl.concat(frames)


def summarise(table: pl.DataFrame, seed: int = 0, resamples: int = 2000) -> pl.DataFrame:
    """Average results over traces, with a 95% bootstrap interval of the mean mass over traces.

    Returns
    -------
    One row per policy, parameters and budget, in the order they were asked: the means of the numeric
    columns, the maximum of the peaks, ``n_traces``, ``mass_low`` and ``mass_high``.
    """
    done = table.filter(pl.col("status") == "ok")
    rng = np.random.default_rng(seed)
    rows = []
    for key, group in done.group_by(_GROUP, maintain_order=True):
        masses = group["mass_mean"].to_numpy()
        drawn = masses[rng.integers(len(masses), size=(resamples, len(masses)))].mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append(
            dict(zip(_GROUP, key, strict=True))
            | {"n_traces": len(masses), "mass_low": float(low), "mass_high": float(high)}
        )
    if not rows:
        return pl.DataFrame()
    peaks = [name for name in ROW_SCHEMA if name.endswith("_peak")]
    averaged = [
        name for name, kind in ROW_SCHEMA.items() if kind.is_numeric() and name not in (*_GROUP, *peaks)
    ]
    means = done.group_by(_GROUP, maintain_order=True).agg(pl.col(averaged).mean(), pl.col(peaks).max())
    return means.join(pl.DataFrame(rows), on=_GROUP, maintain_order="left")
