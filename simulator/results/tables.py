"""The result tables: columns, types, summaries, and what their rows may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from simulator.budget import KEPT, KINDS, UNITS, Budget
from simulator.engine.layer import Retained
from simulator.engine.metrics import RANGES
from simulator.engine.trajectory import Span
from simulator.results.metric_names import DEFAULT_METRIC, DEFAULT_OF_SAMPLES, METRICS
from traces.documents import parse_json, shown
from traces.errors import UserError

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
    "family": pl.String,
    "budget_kind": pl.String,
    "budget_entries": pl.Int64,
    "low_mass_rate": pl.Float64,
    "lost_lookup_rate": pl.Float64,
    "lost_lookup_rms": pl.Float64,
    "lost_lookup_peak": pl.Float64,
    "sampling": pl.String,
    "mass_error": pl.Float64,
    "shift_mean": pl.Float64,
    "predicted_kl": pl.Float64,
    "protection_binding": pl.Boolean,
    "bytes_union_mean": pl.Int64,
    "bytes_union_peak": pl.Int64,
    "bytes_paged_mean": pl.Int64,
    "bytes_paged_peak": pl.Int64,
    "block": pl.Int64,
    "control": pl.String,
}

BUDGET = ["budget_asked", "budget_unit", "budget_kind"]
GROUP = ["policy", "policy_params", *BUDGET]

_OF_HEADS = dict.fromkeys(("layer", "kv_head", "compression", "n_tokens"), pl.Int32)
RETAINED_SCHEMA: dict[str, Any] = (
    {name: ROW_SCHEMA[name] for name in ("trace_id", *GROUP)}
    | _OF_HEADS
    | dict.fromkeys(("slot", "position"), pl.Int32)
)
TRAJECTORY_SCHEMA: dict[str, Any] = (
    {name: ROW_SCHEMA[name] for name in ("trace_id", "trace", *GROUP)}
    | _OF_HEADS
    | {"n_steps": pl.Int32, "budget_entries": pl.Int64, "n_entries": pl.Int64, "mass": pl.Float64}
)

# Columns without which rows of a file tell nothing, in whatever version they were written.
NEEDED = {
    name: ROW_SCHEMA[name]
    for name in (
        *("trace_id", "model", "policy", "policy_params", "budget_asked", "budget_unit", "status"),
        *("entries_mean", "entries_peak", "bytes_mean", "bytes_peak", "mass_mean", "mass_p05"),
        *("miss_rate", "n_steps", "n_evictions"),
    )
}


def result_table(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Build the table of results, one row per trace, policy and budget."""
    return pl.DataFrame(list(rows), schema=ROW_SCHEMA)


def retained_table(cells: Iterable[tuple[Mapping[str, Any], Sequence[Retained]]]) -> pl.DataFrame:
    """Build the table of the entries retained after every compression, one row per slot.

    The labels of a cell hold trace_id, the columns of ``GROUP``, and perhaps more.
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


def trajectory_table(labels: Mapping[str, Any], spans: Sequence[Span]) -> pl.DataFrame:
    """Build the table of one cell's budgets and mass over time, one row per layer, span and KV head.

    A span ends with a compression: ``n_steps`` decode steps up to ``n_tokens`` tokens, the head's
    ``budget_entries`` in force there, the ``n_entries`` it holds after it, and the ``mass`` retained during
    the steps (null without one, as where the prompt is compressed). The last span of every head ends with
    the last token; its ``compression`` is null and its budget the one before (null if it never compressed).
    Weighted by ``n_steps``, ``mass`` averages to ``mass_mean`` of the results. ``labels`` hold trace_id,
    trace and the columns of ``GROUP``.
    """
    if not spans:
        return pl.DataFrame(schema=TRAJECTORY_SCHEMA)
    n_heads = len(spans[0].lengths)

    def per_head(name: str) -> pl.Series:
        values = [getattr(span, name) for span in spans]
        gone = np.full(n_heads, np.nan)
        # By way of floats, which hold whole numbers exactly up to 2^53 and know a missing one.
        joined = np.concatenate([gone if value is None else value.astype(np.float64) for value in values])
        return pl.Series(joined).fill_nan(None)

    columns = {
        name: pl.Series([getattr(span, name) for span in spans for _ in range(n_heads)], dtype=pl.Int32)
        for name in ("layer", "compression", "n_tokens", "n_steps")
    }
    columns["kv_head"] = pl.Series(np.tile(np.arange(n_heads), len(spans)))
    columns["budget_entries"] = per_head("budgets")
    columns["n_entries"] = per_head("lengths")
    columns["mass"] = per_head("mass")
    table = pl.DataFrame(columns).with_columns([pl.lit(value).alias(name) for name, value in labels.items()])
    return table.select(pl.col(name).cast(kind) for name, kind in TRAJECTORY_SCHEMA.items())


def budget_columns(budget: Budget | None) -> dict[str, Any]:
    """Give what rows tell of a budget, columns ``BUDGET``; nulls for the full cache, which has none."""
    if budget is None:
        return dict.fromkeys(BUDGET)
    return dict(zip(BUDGET, (budget.amount, budget.unit, budget.kind), strict=True))


def with_budget_kind(table: pl.DataFrame) -> pl.DataFrame:
    """Tell the kind of budgets in rows of a version that had one kind only."""
    if "budget_asked" not in table.columns:
        return table
    kinds = [pl.col("budget_kind").cast(pl.String)] if "budget_kind" in table.columns else []
    usual = pl.when(pl.col("budget_asked").is_not_null()).then(pl.lit(KEPT))
    return table.with_columns(budget_kind=pl.coalesce(*kinds, usual))


def summarise(table: pl.DataFrame, seed: int = 0, resamples: int = 2000) -> pl.DataFrame:
    """Average results over traces, with 95% bootstrap intervals over traces.

    Where some cells failed, a budget is averaged over the traces on which all its policies succeeded
    (policies that never did are left out), so that rows of one budget always speak of the same traces.

    Returns
    -------
    One row per policy, parameters and budget, in the order they were asked: the means of the numeric
    columns, the maximum of the peaks, ``n_traces``, the interval ``mass_low`` to ``mass_high`` of the mean
    mass, ``is_first`` for the evicting policy that `usual_metric` puts first at its budget, and for the other
    evicting ones ``memory_to_first`` (relative difference of the mean bytes) and ``behind``,
    ``behind_low``, ``behind_high``: how much worse they are by that number, trace by trace. An interval that
    holds 0 is noise.
    """
    done = comparable(table)
    if done.is_empty():
        return pl.DataFrame()
    rng = np.random.default_rng(seed)
    intervals, metric = [], usual_metric(done)
    for _, same_budget in done.group_by(GROUP[2:], maintain_order=True):
        intervals += _intervals(same_budget, metric, rng, resamples)
    # Rows of an earlier version lack a column.
    peaks = [name for name in ("entries_peak", "bytes_peak") if name in done.columns]
    averaged = [
        name
        for name, kind in ROW_SCHEMA.items()
        if kind.is_numeric() and name not in (*GROUP, *peaks) and name in done.columns
    ]
    means = done.group_by(GROUP, maintain_order=True).agg(
        *map(mean_over_traces, averaged), pl.col(peaks).max()
    )
    found = pl.DataFrame(intervals, infer_schema_length=None)
    asked = table.select(GROUP).unique(maintain_order=True)
    joined = asked.join(means, on=GROUP, how="inner", maintain_order="left")
    return joined.join(found, on=GROUP, maintain_order="left")


def mean_over_traces(name: str) -> pl.Expr:
    """Average a column of rows; a prediction only if there is one of every trace."""
    mean = pl.col(name).mean()
    return mean if name != "predicted_kl" else pl.when(pl.col(name).null_count() == 0).then(mean).alias(name)


def usual_metric(table: pl.DataFrame) -> str:
    """Name the number by which policies are told apart where nobody asked for one; rows of success."""
    for name in (DEFAULT_METRIC, DEFAULT_OF_SAMPLES):
        if name in table.columns and not table[name].null_count():
            return name
    return "mass_mean"


def by_model(table: pl.DataFrame) -> list[pl.DataFrame]:
    """Part rows by the model that their traces are of: means over several would be of none of them."""
    models = _models(table)
    return [table] if len(models) < 2 else [table.filter(model=model) for model in models]


def require_one_model(models: Iterable[str]) -> None:
    """Raise UserError where means would be over traces of several models; one is given for each trace."""
    found = list(dict.fromkeys(models))
    if len(found) > 1:
        raise UserError(f"traces are of models {', '.join(found)}; allowed: of one model")


def _models(table: pl.DataFrame) -> list[str]:
    if "model" not in table.columns:
        return []
    return table["model"].drop_nulls().unique(maintain_order=True).to_list()


def comparable(table: pl.DataFrame) -> pl.DataFrame:
    """Keep, for each budget, the traces on which every policy that ever succeeds at it did.

    Where a trace has several rows of the same policy, parameters and budget, as with several seeds, they
    become their mean: a trace counts once. Raises UserError if the rows are of several models.
    """
    require_one_model(_models(table))
    done = _one_row_per_trace(table.filter(pl.col("status") == "ok"))
    per_budget = done.group_by(GROUP[2:]).agg(pl.struct(GROUP[:2]).n_unique().alias("n_policies"))
    per_trace = done.group_by(*GROUP[2:], "trace_id").agg(pl.struct(GROUP[:2]).n_unique().alias("n_done"))
    whole = per_trace.join(per_budget, on=GROUP[2:]).filter(pl.col("n_done") == pl.col("n_policies"))
    return done.join(whole, on=[*GROUP[2:], "trace_id"], how="semi", maintain_order="left")


def _one_row_per_trace(done: pl.DataFrame) -> pl.DataFrame:
    of_one_trace = [*GROUP, "trace_id"]
    if not done.select(of_one_trace).is_duplicated().any():
        return done
    columns = [
        pl.col(name).mean() if kind.is_numeric() else pl.col(name).first()
        for name, kind in done.schema.items()
        if name not in of_one_trace
    ]
    return done.group_by(of_one_trace, maintain_order=True).agg(columns).select(done.columns)


def _intervals(
    same_budget: pl.DataFrame, metric: str, rng: np.random.Generator, resamples: int
) -> list[dict[str, Any]]:
    """Bootstrap the mean mass of every policy at one budget, and how far it is behind the first."""
    groups = [
        (key, group.sort("trace_id")) for key, group in same_budget.group_by(GROUP, maintain_order=True)
    ]
    masses = [group["mass_mean"].to_numpy() for _, group in groups]
    held = [float(group["bytes_mean"].to_numpy().mean()) for _, group in groups]
    evicting = [i for i, (_, group) in enumerate(groups) if group["n_evictions"].sum() > 0]
    sign = 1 if METRICS[metric].more_is_better else -1
    worth = [sign * group[metric].to_numpy() for _, group in groups]
    first = max(evicting, key=lambda i: worth[i].mean(), default=None)
    rows = []
    for i, (key, _) in enumerate(groups):
        low, high = bootstrap(masses[i], rng, resamples)
        row = dict(zip(GROUP, key, strict=True)) | {"n_traces": len(masses[i])}
        row |= {"mass_low": low, "mass_high": high, "is_first": i == first}
        row |= dict.fromkeys(("memory_to_first", "behind", "behind_low", "behind_high"))
        if first is not None and i in evicting and i != first:
            behind = worth[first] - worth[i]
            low, high = bootstrap(behind, rng, resamples)
            row |= {"behind": float(behind.mean()), "behind_low": low, "behind_high": high}
            row["memory_to_first"] = held[i] / held[first] - 1
        rows.append(row)
    return rows


def bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Give the 95% interval of a mean, float64 (n_traces,) resampled over traces."""
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def beside_best(
    values: Mapping[Any, np.ndarray], best: Any, rng: np.random.Generator, resamples: int
) -> dict[Any, tuple[float, float, bool]]:
    """Give the 95% interval of every mean, and whether it is not told apart from the best one.

    ``values`` are float64 (n_traces,) of the same traces in the same order.
    """
    found = {}
    for key, own in values.items():
        low, high = bootstrap(own, rng, resamples)
        behind_low, behind_high = bootstrap(own - values[best], rng, resamples)
        found[key] = low, high, behind_low <= 0 <= behind_high
    return found


def require_sound_rows(table: pl.DataFrame, what: str) -> None:
    """Refuse rows from a file that no replay can have written: without numbers, or with impossible ones.

    ``table`` has the columns ``NEEDED``; ``what`` is the file's name in messages. Raises UserError, which
    names the first such column and row.
    """
    for name in ("trace_id", "policy", "policy_params", "budget_asked", "budget_unit", "status"):
        refuse_rows(table, pl.col(name).is_null(), name, "a value in every row", what)
    refuse_rows(table, ~pl.col("status").is_in(["ok", "error"]), "status", "ok, error", what)
    for parameters in table["policy_params"].unique().sort():
        parse_json(parameters, f"{what}: policy_params", dict[str, Any])
    for name in ("trace", "family", "model", "policy"):
        if name in table.columns:
            has_controls = pl.col(name).str.contains(r"[\x00-\x1f\x7f]")
            refuse_rows(table, has_controls, name, "no control characters", what)
    asked = pl.col("budget_asked")
    refuse_rows(table, ~(asked.is_finite() & (asked > 0)), "budget_asked", "a number above 0", what)
    for name, known in (("budget_unit", UNITS), ("budget_kind", KINDS)):
        if name in table.columns:
            refuse_rows(table, ~pl.col(name).is_in(list(known)), name, ", ".join(known), what)
    done = pl.col("status") == "ok"
    refuse_rows(table, done & (pl.col("n_steps") < 1), "n_steps", "1 or more", what)
    refuse_rows(table, done & pl.col("model").is_null(), "model", "a name", what)
    for name, (low, high) in RANGES.items():
        if name not in table.columns:
            continue
        allowed = f"{low:g} to {high:g}"
        # NaN compares as larger than all numbers.
        refuse_rows(table, done & ~pl.col(name).is_between(low, high), name, allowed, what)
        if name in NEEDED:
            refuse_rows(table, done & pl.col(name).is_null(), name, allowed, what)


def refuse_rows(table: pl.DataFrame, bad: pl.Expr, name: str, allowed: str, what: str) -> None:
    """Refuse a table of a file if ``bad`` holds in a row; raises UserError with its number and column."""
    found = table.with_row_index("row").filter(bad)
    if len(found):
        row = found.row(0, named=True)
        raise UserError(f"{what}, row {row['row'] + 1}: {name} is {shown(row[name])}; allowed: {allowed}")
