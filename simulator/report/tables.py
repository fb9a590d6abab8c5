"""The page's words and tables: what was replayed, who leads, and all means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from simulator.report.quality import has_intervals
from simulator.results.labels import budget_label, row_budget
from simulator.results.metric_names import COMPARED
from simulator.results.tables import BUDGET, GROUP, comparable
from simulator.results.terminal import format_bytes

# Columns of the table of means, and what they are called.
_MEANS = {
    "bytes_mean": "memory, mean",
    "bytes_peak": "memory, peak",
    "bytes_paged_mean": "memory, paged",
    "mass_mean": "mass",
    "mass_p05": "5th percentile",
    "mass_min_head": "worst head",
    "miss_rate": "strongest key gone",
    "lost_lookup_rate": "lost lookups",
    "lost_lookup_rms": "at once",
    "lost_lookup_peak": "worst step",
    "oracle_mass": "oracle",
    "gap": "gap",
    "shift_mean": "shift",
    "predicted_kl": "predicted divergence",
}
_ORACLE = COMPARED["mass_mean"]


def what_was_replayed(rows: pl.DataFrame) -> str:
    """Say in a sentence what the rows are of."""

    def named(name: str) -> list[str]:
        return sorted(rows[name].drop_nulls().unique().to_list()) if name in rows.columns else []

    budgets = rows.select(BUDGET).unique().sort("budget_unit", "budget_asked", "budget_kind")
    labels = [budget_label(*budget) for budget in budgets.iter_rows()]
    n_traces = rows["trace_id"].n_unique()
    families = named("family")
    of_families = f" ({', '.join(families)})" if len(families) > 1 else ""
    models = named("model")
    text = f"{n_traces} trace{'s' if n_traces > 1 else ''}{of_families}"
    text += f" of {', '.join(models)}" if models else ""
    policies = rows["policy"].unique(maintain_order=True).to_list()
    text += f", {len(policies)} {'policies' if len(policies) > 1 else 'policy'} at {', '.join(labels)}."
    versions = named("code_version")
    text += f" Code {', '.join(versions)}." if versions else ""
    samples = named("sampling")
    text += f" Only a sample was measured: {' or '.join(samples)}." if samples else ""
    failed = rows.filter(pl.col("status") != "ok")
    if len(failed):
        reasons = failed["error"].drop_nulls().to_list() if "error" in failed.columns else []
        told = f": {reasons[0].rstrip('.')}" if reasons else ""
        text += f" {len(failed)} of {len(rows)} cells failed and are left out{told}."
    return text


def verdict(found: pl.DataFrame, metric: str) -> str:
    """Say at each budget who is first, who is not told apart from it, who is worse, and whom to decode next.

    ``found`` has rows of `quality_rows`.
    """
    sign = -1 if COMPARED[metric].more_is_better else 1
    several = has_intervals(found)
    sentences: dict[str, list[str]] = {}
    next_ones: dict[str, None] = {}
    for (budget,), own in found.group_by("budget", maintain_order=True):
        ranked = sorted(own.iter_rows(named=True), key=lambda row: sign * row["mean"])
        names = [row["policy"] for row in ranked]
        told = f"{names[0]} {COMPARED[metric].leads}"
        tied = [row["policy"] for row in ranked[1:] if several and row["is_tied"]]
        next_ones |= dict.fromkeys([names[0], *tied])
        if several and len(names) > 1:
            worse = [name for name in names[1:] if name not in tied]
            told += f"; not told apart from it: {_listed(tied) if tied else 'none'}"
            told += f"; worse: {_listed(worse) if worse else 'none'}"
        sentences.setdefault(told, []).append(str(budget))
    everywhere = len(sentences) == 1 and found["budget"].n_unique() > 1
    lines = [
        f"At {'every budget' if everywhere else _listed(budgets, most=9)} {told}."
        for told, budgets in sentences.items()
    ]
    if not several:
        lines.append("One trace tells nothing of noise: differences may be chance.")
    lines.append(f"Decode next: {_listed(list(next_ones), most=9)}.")
    return " ".join(lines)


def _listed(names: Sequence[str], most: int = 4) -> str:
    if len(names) > most:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def standings_table(found: pl.DataFrame, metric: str) -> dict[str, list[dict[str, Any]]]:
    """Write every policy's means, the best policy first: a ``text`` per budget, and whether it ``is_first``.

    ``found`` has rows of `quality_rows`. A text begins with = where it is not told apart from the first, and
    is empty where the policy has no row.
    """
    sign = -1 if COMPARED[metric].more_is_better else 1
    several = has_intervals(found)
    means = found.group_by("policy").agg(pl.col("mean").mean()).sort(sign * pl.col("mean"), "policy")
    budgets = found["budget"].unique(maintain_order=True).to_list()
    cells = {}
    for (budget,), own in found.group_by("budget", maintain_order=True):
        ranked = own.sort(sign * pl.col("mean"), maintain_order=True)
        for place, row in enumerate(ranked.iter_rows(named=True)):
            mark = "=\N{NO-BREAK SPACE}" if place and several and row["is_tied"] else ""
            cells[row["policy"], budget] = {
                "text": mark + COMPARED[metric].written(row["mean"]),
                "is_first": place == 0,
            }
    nothing = {"text": "", "is_first": False}
    return {
        policy: [cells.get((policy, budget), nothing) for budget in budgets] for policy in means["policy"]
    }


def means_table(rows: pl.DataFrame) -> dict[str, list[Any]]:
    """Write the means over traces of every policy and budget: ``head``, and ``lines`` of texts."""
    done = comparable(rows)
    shown = [name for name in _MEANS if name in done.columns and done[name].null_count() < len(done)]
    how = [pl.col(name).max() if name == "bytes_peak" else pl.col(name).mean() for name in shown]
    means = done.group_by(GROUP, maintain_order=True).agg(*how, n_traces=pl.len())
    means = means.sort("budget_unit", "budget_asked", "budget_kind", maintain_order=True)
    lines = [
        [
            row["policy"],
            row_budget(row),
            str(row["n_traces"]),
            *(_written(name, row[name]) for name in shown),
        ]
        for row in means.iter_rows(named=True)
    ]
    return {"head": ["policy", "budget", "traces", *(_MEANS[name] for name in shown)], "lines": lines}


def _written(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return format_bytes(value) if name.startswith("bytes") else COMPARED.get(name, _ORACLE).written(value)
