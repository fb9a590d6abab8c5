"""How far each number of a replay can be trusted, from stored tables: ``simulator/results/fidelity.json``."""

from __future__ import annotations

from typing import Any

import polars as pl

from simulator.results.metric_names import METRICS
from validate.reasoner.tables import judged_rows, result_table

MODEL, PARAMETERS = "kvbudget-reasoner-v2", "2.3 M"
# Found in a search over the other policies, whose figure is then no test of it.
_FOUND_ON_OTHERS = ("lost_lookup_peak",)
# A policy is misjudged if a number ranks it so many places too high, on average over families and budgets.
_PLACES = 3


def measured_fidelity() -> dict[str, Any]:
    """Gather what is known of every number.

    Returns
    -------
    dict
        The model; per metric ``chosen`` and ``others``, the lowest and highest Spearman correlation with
        accuracy within a budget over the families of problems, on the policies that numbers were chosen on
        and on others; and ``misjudged``, the policies that it ranks too high.
    """
    tables = {"chosen": result_table("fidelity"), "others": result_table("fidelity-others")}
    found: dict[str, Any] = {}
    wrong = misjudged()
    for metric in METRICS:
        own = {name: table.filter(metric=metric)["spearman_within"] for name, table in tables.items()}
        found[metric] = {name: [round(min(each), 2), round(max(each), 2)] for name, each in own.items()}
        found[metric] |= {"found_on_others": metric in _FOUND_ON_OTHERS, "misjudged": wrong[metric]}
    return {"model": MODEL, "parameters": PARAMETERS, "metrics": found}


def misjudged() -> dict[str, list[str]]:
    """Find, for every metric, the policies that it ranks too high, the worst first.

    All policies that were decoded are ranked together, at the budgets and families that both tables have.
    """
    rows = [judged_rows(others) for others in (False, True)]
    shared = set(rows[0]["budget"]) & set(rows[1]["budget"])
    both = pl.concat(rows, how="diagonal").filter(pl.col("budget").is_in(list(shared)))
    by_accuracy = pl.col("accuracy").rank(descending=True).over("family", "budget")
    found = {}
    for metric, own in METRICS.items():
        by_number = pl.col(metric).rank(descending=own.more_is_better).over("family", "budget")
        places = both.select("policy", too_high=by_accuracy - by_number)
        means = places.group_by("policy", maintain_order=True).mean()
        wrong = means.filter(pl.col("too_high") >= _PLACES)
        found[metric] = wrong.sort("too_high", descending=True, maintain_order=True)["policy"].to_list()
    return found
