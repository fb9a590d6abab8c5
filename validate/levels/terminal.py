"""How a level's rows look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

from simulator.results.labels import told_apart, with_budget_label
from simulator.results.layout import fitted
from simulator.results.tables import BUDGET, GROUP, beside_best, comparable
from simulator.results.terminal import say
from traces.wording import counted

# Columns in their order, and what stands above them.
_HEADERS = {
    "trace": "trace",
    "policy": "policy",
    "budget": "budget",
    "decisions": "decisions",
    "mismatches": "mismatches",
    "keys_equal": "keys\nequal",
    "mass_mean": "simulated\nmass",
    "forced_mass": "forced\nmass",
    "drift": "drift",
    "lost_lookup_rate": "simulated\nlost\nlookups",
    "forced_lost_lookup_rate": "forced\nlost\nlookups",
    "agreement": "agreement",
    "kl_mean": "kl\nmean",
    "kl_p95": "kl\np95",
    "kl_worst": "kl\nworst",
    "top_changed": "top\nchanged",
    "log_likelihood_change": "log\nlikelihood\nchange",
    "perplexity_ratio": "perplexity\nratio",
}
# What a narrow terminal leaves out, first to last.
_LEAST_TOLD = ("log_likelihood_change", "kl_worst", "forced_lost_lookup_rate", "lost_lookup_rate")


_RESAMPLES = 2000


def print_levels(console: Console, table: pl.DataFrame) -> None:
    """Print a level's rows; of several traces their means, with the interval of the mean divergence."""
    note = ""
    if table["trace_id"].n_unique() > 1 and "kl_mean" in table.columns and len(same := comparable(table)):
        table = _over_traces(same)
        note = (
            f"Means over {counted(max(table['n_traces']), 'trace')}; the mean divergence with its 95% "
            "interval, bootstrapped over traces, and = where it is not told apart from the budget's least."
        )
    (table,) = told_apart(table)
    table = with_budget_label(table)
    table = table.select(name for name in _HEADERS if name in table.columns)

    def make(columns: Sequence[str], names: Mapping[str, str]) -> Table:
        shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        shown.collapse_padding = True  # with so many columns every space counts
        for name in columns:
            is_label = name in ("trace", "policy", "budget")
            side: JustifyMethod = "left" if is_label else "right"
            shown.add_column(_HEADERS[name], justify=side, no_wrap=True)
        for row in table.iter_rows(named=True):
            told = row | {"policy": names[row["policy"]]}
            shown.add_row(*(_text(told[name]) for name in columns))
        return shown

    shown, left_out, legend = fitted(console, make, table.columns, table["policy"], _LEAST_TOLD)
    console.print(shown)
    say(console, left_out, *legend, note)


def _over_traces(same: pl.DataFrame) -> pl.DataFrame:
    """Average comparable rows over traces; ``kl_mean`` becomes a text with its interval."""
    numbers = [
        name for name in _HEADERS if name in same.columns and name not in ("kl_worst", "trace", *GROUP)
    ]
    means = same.group_by(GROUP, maintain_order=True).agg(
        pl.len().alias("n_traces"), pl.col(numbers).mean(), pl.col("kl_worst").max()
    )
    rng, told = np.random.default_rng(0), {}
    for _, at_budget in same.group_by(BUDGET, maintain_order=True):
        groups = {key: own.sort("trace_id") for key, own in at_budget.group_by(GROUP, maintain_order=True)}
        values = {key: own["kl_mean"].to_numpy() for key, own in groups.items()}
        evicting = [key for key, own in groups.items() if own["n_evictions"].sum()]
        least = min(evicting or values, key=lambda key: float(values[key].mean()))
        for key, (low, high, is_tied) in beside_best(values, least, rng, _RESAMPLES).items():
            mark = "= " if is_tied and key in evicting else ""
            told[key] = f"{mark}{values[key].mean():.3f} ±{(high - low) / 2:.3f}"
    return means.with_columns(kl_mean=pl.Series([told[key] for key in means.select(GROUP).iter_rows()]))


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value).removesuffix(".kvtrace")
