"""What a search found: the front on its own traces, and whether its best hold on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from simulator.budget import parse_budget
from simulator.cells import PreparedTrace
from simulator.policies.language import split_name
from simulator.results.labels import with_parameters
from simulator.results.metric_names import COMPARED
from simulator.results.tables import bootstrap, result_table
from simulator.search.judge import Worth
from simulator.search.study import Question, Tried
from traces.atomic import write_text
from traces.errors import UserError
from traces.trace import Trace

# Memory counts as equal within so much: heads and layers fill at different times.
EQUAL_MEMORY = 0.01
VERDICTS = ("better", "worse", "not told apart", "failed")

FRONT_SCHEMA: dict[str, Any] = {
    "policy": pl.String,
    "budget": pl.String,
    "metric": pl.Float64,
    "bytes_mean": pl.Float64,
}
VERDICT_SCHEMA: dict[str, Any] = {
    "role": pl.String,
    "policy": pl.String,
    "budget": pl.String,
    "searched": pl.Float64,
    "held_out": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "memory_to_base": pl.Float64,
    "n_traces": pl.Int64,
    "verdict": pl.String,
}


def front(tried: Sequence[Tried], sign: int) -> pl.DataFrame:
    """List the policies that none dominates in metric and memory, the smallest memory first."""
    best = [own for own in tried if not any(other.worth.dominates(own.worth, sign) for other in tried)]
    rows = [(own.policy, own.budget, own.worth.metric, own.worth.memory) for own in best]
    return pl.DataFrame(rows, schema=FRONT_SCHEMA, orient="row").sort("bytes_mean", "metric")


def candidates(tried: Sequence[Tried], base: Worth, budget: str, sign: int, n: int) -> list[Tried]:
    """Choose the best policies of a budget that hold no more memory than the base policy."""
    fitting = [
        own for own in tried if own.budget == budget and own.worth.memory <= base.memory * (1 + EQUAL_MEMORY)
    ]
    return sorted(fitting, key=lambda own: (sign * own.worth.metric, own.worth.memory))[:n]


def replay_held_out(
    traces: Sequence[Trace],
    asked: Sequence[tuple[str, str]],
    question: Question,
    jobs: int,
    on_cell: Callable[[], None] = lambda: None,
) -> pl.DataFrame:
    """Replay policies whole, in ``jobs`` threads, on traces that none was chosen on.

    ``asked`` are policies and budgets as they are written, each pair once. Returns rows of a replay, with
    ``asked_policy`` and ``asked_budget``.
    """
    seed, rows = question.seed, []
    for trace in traces:
        prepared = PreparedTrace(trace, jobs=jobs, seed=seed)
        for text, budget in asked:
            policy = question.space.parse(text)
            rows.append(prepared.replay(policy, parse_budget(budget), seed=seed, waves=question.waves).row)
            on_cell()
    policies, budgets = zip(*asked, strict=True)
    return result_table(rows).with_columns(
        pl.Series("asked_policy", policies * len(traces), dtype=pl.String),
        pl.Series("asked_budget", budgets * len(traces), dtype=pl.String),
    )


def judge_held_out(
    rows: pl.DataFrame, chosen: Sequence[tuple[str, Tried]], base: str, metric: str, *, seed: int = 0
) -> pl.DataFrame:
    """Set policies, each with its role, against the base on traces that none was chosen on.

    ``rows`` are of `replay_held_out`; ``seed`` is of the bootstrap over traces.

    Returns
    -------
    polars.DataFrame
        Columns of ``VERDICT_SCHEMA``: the difference of each to the base, trace by trace, with its 95%
        interval; an interval that holds 0, or a single trace, tells nothing apart. A policy that failed on
        some trace has no numbers.

    Raises
    ------
    UserError
        If the base failed on some trace.
    """
    rng = np.random.default_rng(seed)
    better = 1 if COMPARED[metric].more_is_better else -1
    found = []
    for role, own in chosen:
        mine, bases = (_of(rows, text, own.budget) for text in (own.policy, base))
        failed = bases.filter(pl.col("status") != "ok")
        if not failed.is_empty():
            raise UserError(f"{base} at {own.budget}, {failed['trace'][0]}: {failed['error'][0]}")
        row = {"role": role, "policy": own.policy, "budget": own.budget, "searched": own.worth.metric}
        row["n_traces"] = len(bases)
        if (mine["status"] != "ok").any():
            found.append(row | {"verdict": VERDICTS[3]})
            continue
        both = mine.join(bases, on="trace_id", suffix="_base", validate="1:1").sort("trace_id")
        differences = (both[metric] - both[f"{metric}_base"]).to_numpy()
        low, high = bootstrap(differences, rng, 2000)
        # One trace has no spread.
        is_apart = len(both) > 1 and not low <= 0 <= high
        held, base_held = (float(both[name].to_numpy().mean()) for name in ("bytes_mean", "bytes_mean_base"))
        row |= {
            "held_out": float(both[metric].to_numpy().mean()),
            "difference": float(differences.mean()),
            "difference_low": low,
            "difference_high": high,
            "memory_to_base": held / base_held - 1,
            "verdict": "" if role == "base" else VERDICTS[(0 if better * low > 0 else 1) if is_apart else 2],
        }
        found.append(row)
    return pl.DataFrame(found, schema=VERDICT_SCHEMA)


def write_winners(path: Path, verdicts: pl.DataFrame, metric: str, fixed: dict[str, Any]) -> None:
    """Write what ``sim validate live --configs`` decodes: each budget's winner, what it beat, the base."""
    entries = [
        {"policy": _with(row["policy"], fixed), "budget": row["budget"], "role": row["role"]}
        | {"metric": metric}
        | {name: row[name] for name in VERDICT_SCHEMA if name not in ("policy", "budget", "role")}
        for row in verdicts.iter_rows(named=True)
        if row["verdict"] != VERDICTS[3]
    ]
    write_text(path, "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries) + "\n]\n")


def _of(rows: pl.DataFrame, policy: str, budget: str) -> pl.DataFrame:
    return rows.filter((pl.col("asked_policy") == policy) & (pl.col("asked_budget") == budget))


def _with(policy: str, fixed: dict[str, Any]) -> str:
    name = split_name(policy)
    # The text may name some of them, at the same value.
    given = policy[len(name) :]
    return with_parameters(policy, {key: value for key, value in fixed.items() if f"{key}=" not in given})
