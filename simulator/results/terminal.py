"""How results look on a terminal: one table, grouped by budget, as wide as the terminal allows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from simulator.budget import ON_PROMPT, PEAK
from simulator.results.labels import row_budget
from simulator.results.layout import empty_table, fitted
from simulator.results.metric_names import COMPARED, fidelity_note
from simulator.results.tables import GROUP, by_model, summarise, usual_metric

# Column name to header, in order.
_HEADERS = {
    "budget": "\nbudget",
    "policy": "\npolicy",
    "entries": "entries\nmean",
    "entries_peak": "\npeak",
    "memory": "memory\nmean",
    "memory_peak": "\npeak",
    "mass": "\nmass",
    "interval": "\n±95%",
    "p05": "\np05",
    "worst_head": "worst\nhead",
    "miss_rate": "miss\nrate",
    "lost_lookups": "lost\nlookups",
    "worst_step": "worst\nstep",
    "shift": "\nshift",
    "predicted": "predicted\nKL",
    "oracle": "\noracle",
    "gap": "\ngap",
    "behind": "behind\nfirst",
}
# What a narrow terminal leaves out, first to last.
_EXPENDABLE = (
    "entries_peak",
    "oracle",
    "worst_head",
    "memory_peak",
    "entries",
    "p05",
    "gap",
    "miss_rate",
    "interval",
    "memory",
)


def print_results(table: pl.DataFrame, console: Console) -> None:
    """Print results, a table per model: grouped by budget, one row per policy, averaged over its traces."""
    for own in by_model(table):
        _print_model(own, console)


def _print_model(table: pl.DataFrame, console: Console) -> None:
    summary = summarise(table)
    if summary.is_empty():
        return
    several = table["trace_id"].n_unique() > 1
    rows = summary.to_dicts()
    shared = _shared_parameters(rows)
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row_budget(row), []).append(_cells(row, shared))
    sampled = "sampling" in table.columns and table["sampling"].is_not_null().any()
    wanted = {"interval": several or sampled, "behind": several}
    shown_rows = [cells for own in groups.values() for cells in own]
    # Not what no row could tell, such as the oracle of a sample of heads.
    columns = [
        name
        for name in _HEADERS
        if wanted.get(name, True) and (name == "budget" or any(cells[name] for cells in shown_rows))
    ]
    labels = [cells["policy"] for cells in shown_rows]
    shown, note, legend = fitted(console, partial(_layout, groups), columns, labels, _EXPENDABLE)
    say(console, _caption(table, several, shared), note)
    console.print(shown)
    say(console, *legend)
    if several:
        note = fidelity_note(
            usual_metric(table.filter(pl.col("status") == "ok")),
            table["model"].drop_nulls(),
            table["policy"],
        )
        say(console, note)
    print_unevicted(table, console)


def print_unevicted(table: pl.DataFrame, console: Console) -> None:
    """Say of every budget which policies left a full cache, whose numbers tell nothing of a policy."""
    shared = _shared_parameters(table.select(GROUP[:2]).unique(maintain_order=True).to_dicts())
    told: dict[tuple[str, str], list[str]] = {}
    for _, own in table.filter(pl.col("status") == "ok").group_by(GROUP, maintain_order=True):
        row = own.row(0, named=True)
        n_full, n_traces = int((own["n_evictions"] == 0).sum()), len(own)
        if n_full and json.loads(row["policy_params"]).get("trigger") != "never":
            where = "" if n_full == n_traces else f" on {n_full} of {n_traces} traces"
            told.setdefault((row_budget(row), where), []).append(_policy_label(row, shared))
    for (budget, where), policies in told.items():
        names = ", ".join(policies)
        note = f"At {budget} nothing was evicted{where} by {names}: that is the full cache."
        say(console, note)


def print_standings(
    table: pl.DataFrame, metric: str, models: Sequence[str], console: Console, *, as_markdown: bool = False
) -> None:
    """Print how policies compare at each budget: one row per policy, sorted, and one column per budget.

    ``table`` is of ``standings.standings`` and compares ``metric``; ``models`` are those of the traces.
    """
    rows = table.to_dicts()
    shared = _shared_parameters(rows)
    budgets = list(dict.fromkeys(row_budget(row) for row in rows))
    by_policy: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault((row["policy"], row["policy_params"]), {})[row_budget(row)] = row
    sign = -1 if COMPARED[metric].more_is_better else 1
    ranked = sorted(by_policy.values(), key=lambda own: sign * sum(row["mean"] for row in own.values()))
    labels = {id(own): _policy_label(next(iter(own.values())), shared) for own in ranked}

    def make(columns: Sequence[str], names: Mapping[str, str]) -> Table:
        shown = empty_table(columns, as_markdown=as_markdown)
        for own in ranked:
            cells = [_standing(own[budget]) if budget in own else "" for budget in budgets]
            memory = sum(row["memory"] for row in own.values()) / len(own)
            told = f"{memory:+.0%}" if abs(memory) > 0.005 else ""
            shown.add_row(names[labels[id(own)]], *cells, told)
        return shown

    shown, _, legend = fitted(console, make, ["policy", *budgets, "memory"], labels.values())
    told = "".join(f", {name} {value}" for name, value in shared.items())
    least, most = min(row["n_traces"] for row in rows), max(row["n_traces"] for row in rows)
    counted = f"{most}" if least == most else f"{least} to {most}"
    better = "more" if COMPARED[metric].more_is_better else "less"
    if most == 1:
        intervals, marks = "no interval: one trace has no spread", ""
    else:
        intervals = "±95% bootstrapped over traces"
        marks = "= not told apart from the first at this budget; "
    name = f"{COMPARED[metric].label} ({metric}, {better} is better)"
    caption = (
        f"{name} over {counted} trace{'s' * (most > 1)}{told}, {intervals}.\n"
        f"{marks}memory: against the median policy, where it differs."
    )
    say(console, caption)
    console.print(shown)
    say(console, *legend, fidelity_note(metric, models, (row["policy"] for row in rows)))


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, however long; an empty one is none."""
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _standing(row: dict[str, Any]) -> str:
    if row["n_traces"] == 1:
        return f"{row['mean']:.4f}"
    return f"{'= ' if row['is_tied'] else ''}{row['mean']:.4f} ±{(row['high'] - row['low']) / 2:.4f}"


def _layout(
    groups: dict[str, list[dict[str, str]]], columns: Sequence[str], names: Mapping[str, str]
) -> Table:
    headers = [_HEADERS[name] for name in columns]
    shown = empty_table(headers, (_HEADERS["policy"],), collapse_padding=True)
    for label, rows in groups.items():
        for number, cells in enumerate(rows):
            texts = cells | {"budget": label if number == 0 else "", "policy": names[cells["policy"]]}
            shown.add_row(*(texts[name] for name in columns), end_section=number == len(rows) - 1)
    return shown


def _caption(table: pl.DataFrame, several: bool, shared: dict[str, Any]) -> str:
    models = ", ".join(sorted(set(table["model"].drop_nulls())))
    done = table.filter(pl.col("status") == "ok")
    steps = int(done.unique("trace_id")["n_steps"].sum())
    named = f"{done['trace_id'].n_unique()} traces" if several else table["trace"][0]
    told = "".join(f", {name} {value}" for name, value in shared.items())
    lines = [
        f"{named} of {models}: {steps:,} decode steps{told}. Budgets are per KV head after a compression"
        f"{', with ! at any step' if (table['budget_kind'] == PEAK).any() else ''}"
        f"{', with +prompt beside the prompt' if (table['budget_kind'] == ON_PROMPT).any() else ''};",
        "mass is the full cache's attention on what was retained, oracle the most that memory could hold;",
        "a lookup is lost if one key holds more than half of a head's attention and is gone.",
    ]
    lines += _paged(done)
    sampled = [] if "sampling" not in done.columns else done["sampling"].drop_nulls().unique().to_list()
    if sampled:
        interval = "" if several else "; ±95% is what that leaves open of the mass"
        lines.append(f"Only a sample was measured: {' or '.join(sorted(sampled))}{interval}.")
    if "shift_mean" in done.columns and done["shift_mean"].count():
        lines.append("Shift is how far predictions move, to first order; sim validate masked measures it.")
        evicting = done.filter(pl.col("n_evictions") > 0)
        # Rows of an earlier version have no such column.
        missing = len(evicting) - (evicting["predicted_kl"].count() if "predicted_kl" in done.columns else 0)
        if missing:
            lines.append(
                f"For {missing} of {len(evicting)} cells no divergence is predicted: no calibration covers "
                "their model, draws, text and shift (sim validate calibrate makes one)."
            )
    if several:
        metric = usual_metric(done)
        lines.append(
            f"First is who {COMPARED[metric].leads} ({metric}); the others' distance to it is noise where "
            "the paired interval over traces holds 0."
        )
        if len(done) < len(table):
            lines.append(
                "Some cells failed: a budget's rows average the traces that all its policies replayed."
            )
    return "\n".join(lines)


def _paged(done: pl.DataFrame) -> list[str]:
    """Say what engines with one block table for all heads would hold; rows of an earlier version do not."""
    # Rows of a validation do not tell the block.
    if not {"block", "bytes_paged_mean"} <= set(done.columns):
        return []
    known = pl.col("block").is_not_null() & pl.col("bytes_paged_mean").is_not_null()
    evicting = done.filter((pl.col("n_evictions") > 0) & (pl.col("bytes_mean") > 0) & known)
    if evicting.is_empty():
        return []
    means = evicting.group_by(GROUP).agg(pl.col("bytes_paged_mean", "bytes_mean").mean())
    ratio = (means["bytes_paged_mean"] / means["bytes_mean"]).to_numpy()
    blocks = " or ".join(str(block) for block in sorted(evicting["block"].unique().to_list()))
    low, high = f"{ratio.min():.2f}", f"{ratio.max():.2f}"
    times = low if low == high else f"{low} to {high}"
    return [
        f"Paged engines, with one table of blocks of {blocks} for all heads, hold {times} times that memory."
    ]


def _cells(row: dict[str, Any], shared: dict[str, Any]) -> dict[str, str]:
    spread = row.get("mass_error") if row["n_traces"] == 1 else (row["mass_high"] - row["mass_low"]) / 2
    return {
        "policy": _policy_label(row, shared),
        "entries": f"{row['entries_mean']:.1f}",
        "entries_peak": f"{row['entries_peak']:.1f}",
        "memory": format_bytes(row["bytes_mean"]),
        "memory_peak": format_bytes(row["bytes_peak"]),
        "mass": f"{row['mass_mean']:.4f}",
        "interval": _four_digits(spread),
        "p05": _four_digits(row["mass_p05"]),
        "worst_head": _four_digits(row["mass_min_head"]),
        "miss_rate": _four_digits(row["miss_rate"]),
        "lost_lookups": _four_digits(row["lost_lookup_rate"]),
        "worst_step": _four_digits(row["lost_lookup_peak"]),
        "shift": _four_digits(row.get("shift_mean")),
        "predicted": _four_digits(row.get("predicted_kl")),
        "oracle": _four_digits(row["oracle_mass"]),
        # A full cache may come out a rounding error above its bound.
        "gap": _four_digits(None if row["gap"] is None else max(0.0, row["gap"])),
        "behind": _behind(row),
    }


def _four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _behind(row: dict[str, Any]) -> str:
    if row["behind"] is None:
        return "first" if row["is_first"] else ""
    # Policies are compared at equal memory: say where that does not hold.
    memory = f" {row['memory_to_first']:+.0%} mem" if abs(row["memory_to_first"]) > 0.01 else ""
    noise = " noise" if row["behind_low"] <= 0 <= row["behind_high"] else ""
    return f"{row['behind']:.4f}{noise}{memory}"


def _changed_parameters(row: dict[str, Any]) -> dict[str, Any]:
    from simulator.policies.language import parse_policy
    from traces.errors import UserError

    given = json.loads(row["policy_params"])
    if "trigger" not in given:  # rows that another program wrote
        return given
    try:
        usual = parse_policy(row["policy"]).parameters["trigger"]
        defaults = parse_policy(f"{row['policy']}:trigger={given['trigger']}").parameters | {"trigger": usual}
    except UserError:
        # A user's file that is gone, or was edited since: nobody knows its defaults now.
        defaults = {}
    return {name: value for name, value in given.items() if name not in defaults or defaults[name] != value}


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
        # Four digits are read worse than the next unit.
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
