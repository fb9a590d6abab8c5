"""How far each number of a replay can be trusted, from stored tables: ``simulator/results/fidelity.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from simulator.results.metric_names import COMPARED, METRICS, SHIFT, Metric
from validate.live.fidelity import rank
from validate.pretrained.stored import FOUND, mean_rows, models_with, ranks_within, shifted_rows
from validate.reasoner.tables import MODEL, PARAMETERS, cells_of, judged_rows, result_table

# Found in a search over the other policies, whose figure is then no test of it.
_FOUND_ON_OTHERS = ("lost_lookup_peak",)
# A policy is misjudged if a number ranks it so many places too high, on average over budgets (and families).
_PLACES = 3
_NUMBERS = (*METRICS.values(), COMPARED[SHIFT])


def measured_fidelity() -> dict[str, Any]:
    """Gather what is known of every number.

    Returns
    -------
    dict
        The model; per metric ``chosen`` and ``others``, the lowest and highest Spearman correlation with
        accuracy within a budget over the families of problems, on the policies that numbers were chosen on
        and on others; and ``misjudged``, the policies that it ranks too high. Under ``pretrained``, by model,
        the number of ``policies`` and per metric the lowest and highest correlation over budgets with the
        masked divergence, ``divergence``, and ``misjudged``.
    """
    tables = {"chosen": result_table("fidelity"), "others": result_table("fidelity-others")}
    within = {
        metric: {
            name: table.filter(metric=metric)["spearman_within"].to_list() for name, table in tables.items()
        }
        for metric in METRICS
    }
    within[SHIFT] = {"chosen": _of_shifts(others=False), "others": _of_shifts(others=True)}
    found: dict[str, Any] = {}
    wrong = misjudged()
    for metric, own in within.items():
        found[metric] = {name: [round(min(each), 2), round(max(each), 2)] for name, each in own.items()}
        found[metric] |= {"found_on_others": metric in _FOUND_ON_OTHERS, "misjudged": wrong[metric]}
    pretrained = {model: _by_divergence(model) for model in models_with("masked")}
    return {"model": MODEL, "parameters": PARAMETERS, "metrics": found, "pretrained": pretrained}


def misjudged() -> dict[str, list[str]]:
    """Find, for every metric, the policies that it ranks too high, the worst first.

    All policies that were decoded are ranked together, at the budgets and families that both tables have.
    """
    rows = [judged_rows(others) for others in (False, True)]
    shared = set(rows[0]["budget"]) & set(rows[1]["budget"])
    both = pl.concat(rows, how="diagonal").filter(pl.col("budget").is_in(list(shared)))
    return _too_high(both.with_columns(truth=-pl.col("accuracy")), ["family", "budget"], _NUMBERS)


def _of_shifts(others: bool) -> list[float]:
    """Correlate shifts with accuracy within a budget, in every family."""
    cells = cells_of(judged_rows(others))
    return [
        rank(own.simulated[SHIFT][:, 0], own.solved[:, 0], own.budgets).spearman_within
        for own in cells.values()
    ]


def _by_divergence(model: str) -> dict[str, Any]:
    """Tell how every number ranks policies by the divergence that was measured on a pretrained model."""
    told = [(mean_rows(model), _NUMBERS[:-1])]
    if model in models_with("shift"):
        # Of fewer texts, with sensitivities.
        shifts = shifted_rows(model).group_by("policy", "budget", maintain_order=True)
        told.append((shifts.agg(pl.col(SHIFT, "kl_mean").mean()), _NUMBERS[-1:]))
    metrics = {}
    for means, numbers in told:
        wrong = _too_high(means.with_columns(truth="kl_mean"), ["budget"], numbers)
        for own in numbers:
            ranks = ranks_within(means, own)
            span = [round(min(ranks), 2), round(max(ranks), 2)]
            # What a search found goes by the name of what it began with.
            named = [policy for policy in wrong[own.column] if policy != FOUND]
            metrics[own.column] = {"divergence": span, "misjudged": named}
    return {"policies": told[0][0]["policy"].n_unique(), "metrics": metrics}


def _too_high(rows: pl.DataFrame, within: list[str], numbers: Sequence[Metric]) -> dict[str, list[str]]:
    """Find the policies that every number ranks too high against ``truth``, of which less is better."""
    by_truth = pl.col("truth").rank().over(within)
    found = {}
    for own in numbers:
        by_number = pl.col(own.column).rank(descending=own.more_is_better).over(within)
        places = rows.select("policy", too_high=by_truth - by_number)
        means = places.group_by("policy", maintain_order=True).mean()
        wrong = means.filter(pl.col("too_high") >= _PLACES)
        found[own.column] = wrong.sort("too_high", descending=True, maintain_order=True)["policy"].to_list()
    return found
