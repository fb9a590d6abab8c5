"""How well the simulator's numbers predict accuracy under real eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy.stats import kendalltau

from simulator.results.metric_names import METRICS
from simulator.results.ranking import spearman
from traces.errors import UserError
from validate.live.accuracy import CELL, solved_shares

RESAMPLES = 500
LIVE_HALF = "live_half"


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """One family's cells: simulated and live, problem by problem.

    Attributes
    ----------
    labels : list of tuples, values of ``CELL``
    simulated : dict of float64 (n_cells, n_traces), by metric; larger predicts better
    solved : float64 (n_cells, n_problems)
    """

    labels: list[tuple[Any, ...]]
    simulated: dict[str, np.ndarray]
    solved: np.ndarray

    @property
    def budgets(self) -> list[np.ndarray]:
        """Indices of the cells of each budget."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for i, label in enumerate(self.labels):
            found.setdefault(label[2:], []).append(i)
        return [np.array(cells) for cells in found.values()]


def matched_cells(simulated: pl.DataFrame, live: pl.DataFrame) -> dict[str, Cells]:
    """Bring a replay's rows and a live run's rows together, per family.

    Parameters
    ----------
    simulated : polars.DataFrame
        Rows of a replay; ``family`` tells whose trace it is.
    live : polars.DataFrame
        Rows of ``completions.ROW_SCHEMA``.

    Raises
    ------
    UserError
        If no family, policy and budget is in both.
    """
    # Problems without a family have an empty one in a live run, and none in a trace.
    done = simulated.filter(pl.col("status") == "ok").with_columns(pl.col("family").fill_null(""))
    found = {}
    for family in live["family"].unique(maintain_order=True).sort().to_list():
        own_live = live.filter((pl.col("family") == family) & pl.col("budget_asked").is_not_null())
        own_simulated = done.filter(pl.col("family") == family)
        live_cells = dict(own_live.group_by(CELL, maintain_order=True))
        sim_cells = dict(own_simulated.group_by(CELL, maintain_order=True))
        labels = [label for label in sim_cells if label in live_cells]
        if not labels:
            continue
        problems = set.intersection(*(set(live_cells[label]["problem"]) for label in labels))
        traces = set.intersection(*(set(sim_cells[label]["trace_id"]) for label in labels))
        if not problems or not traces:
            continue
        solved = [
            solved_shares(live_cells[label].filter(pl.col("problem").is_in(list(problems))))["right"]
            for label in labels
        ]
        shared = [
            sim_cells[label].filter(pl.col("trace_id").is_in(list(traces))).sort("trace_id")
            for label in labels
        ]
        values = {
            name: (1 if metric.more_is_better else -1) * np.array([cell[name] for cell in shared])
            for name, metric in METRICS.items()
            if name in done.columns and not done[name].null_count()
        }
        found[family] = Cells(labels, values, np.array(solved))
    if not found:
        raise UserError(
            "no family, policy and budget is in both the simulated and the live rows; allowed: a replay of "
            "the same policies, parameters and budgets on traces of the same families"
        )
    return found


class Ranking(NamedTuple):
    """How a metric orders cells, compared with live accuracy.

    Attributes
    ----------
    spearman, kendall : float
        Over all cells.
    spearman_within, kendall_within : float
        Mean over budgets of the same within one budget.
    regret : float
        Accuracy lost by taking the metric's best policy instead of the best, mean over budgets.
    regret_most : float
        At the worst budget.
    """

    spearman: float
    kendall: float
    spearman_within: float
    kendall_within: float
    regret: float
    regret_most: float


def rank(metric: np.ndarray, accuracy: np.ndarray, budgets: Sequence[np.ndarray]) -> Ranking:
    """Compare one metric with accuracy over cells; both float (n_cells,), larger is better.

    Budgets at which all policies are equally accurate (none answers anything, say) order nothing and are left
    out of the means within a budget.
    """
    telling = [cells for cells in budgets if len(cells) > 1 and np.ptp(accuracy[cells]) > 0]
    within = [(metric[cells], accuracy[cells]) for cells in telling]
    regrets = [own_accuracy.max() - own_accuracy[own_metric.argmax()] for own_metric, own_accuracy in within]
    return Ranking(
        spearman(metric, accuracy),
        _kendall(metric, accuracy),
        _mean([spearman(*pair) for pair in within]),
        _mean([_kendall(*pair) for pair in within]),
        _mean(regrets),
        max(regrets, default=float("nan")),
    )


def _kendall(metric: np.ndarray, accuracy: np.ndarray) -> float:
    """Correlate, with 0 for a metric that tells nothing apart."""
    if np.ptp(metric) == 0 or np.ptp(accuracy) == 0:
        return 0.0
    return float(kendalltau(metric, accuracy).statistic)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def fidelity_table(cells: dict[str, Cells], resamples: int = RESAMPLES, seed: int = 0) -> pl.DataFrame:
    """Rank every metric against live accuracy, per family, with intervals.

    Intervals are bootstrapped over problems and over traces at once: they say what other problems of the
    family would have given, not what other policies would have.

    Returns
    -------
    polars.DataFrame
        family, n_cells, n_budgets, n_problems, n_traces, metric, and every field of `Ranking` with its
        95% interval as ``_low`` and ``_high``. The metric `LIVE_HALF` is no simulation but the accuracy on a
        random half of the problems, judged on the other half.
    """
    found = []
    for family, own in cells.items():
        n_problems, n_traces = own.solved.shape[1], next(iter(own.simulated.values())).shape[1]
        labels = {
            "family": family,
            "n_cells": len(own.labels),
            "n_budgets": len(own.budgets),
            "n_problems": n_problems,
            "n_traces": n_traces,
        }
        for metric, values in own.simulated.items():
            # Every metric meets the same resamples.
            rng = np.random.default_rng(seed)
            measured = rank(values.mean(1), own.solved.mean(1), own.budgets)
            drawn = [
                rank(
                    values[:, rng.integers(n_traces, size=n_traces)].mean(1),
                    own.solved[:, rng.integers(n_problems, size=n_problems)].mean(1),
                    own.budgets,
                )
                for _ in range(resamples)
            ]
            found.append(labels | {"metric": metric} | _with_intervals(measured, drawn))
        halves = _live_halves(own, resamples, np.random.default_rng(seed))
        if halves:
            mean = Ranking(*(_mean(_known(halves, name)) for name in Ranking._fields))
            found.append(labels | {"metric": LIVE_HALF} | _with_intervals(mean, halves))
    return pl.DataFrame(found)


def _live_halves(cells: Cells, resamples: int, rng: np.random.Generator) -> list[Ranking]:
    """Predict half of the problems by decoding the other half: what a small live run would have told."""
    half = cells.solved.shape[1] // 2
    if not half:
        return []
    drawn = []
    for _ in range(resamples):
        order = rng.permutation(cells.solved.shape[1])
        one, other = cells.solved[:, order[:half]].mean(1), cells.solved[:, order[half:]].mean(1)
        drawn.append(rank(one, other, cells.budgets))
    return drawn


def _with_intervals(measured: Ranking, drawn: Sequence[Ranking]) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in Ranking._fields:
        low, high = np.quantile(_known(drawn, name) or [np.nan], [0.025, 0.975])
        row |= {name: getattr(measured, name), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def _known(rankings: Sequence[Ranking], name: str) -> list[float]:
    """List one field without those that are not a number, where no budget tells policies apart."""
    return [value for each in rankings if not np.isnan(value := getattr(each, name))]


def ranked_metrics(fidelity: pl.DataFrame) -> list[str]:
    """List metrics by their correlation within a budget, mean over families, the highest first."""
    # A family whose budgets tell no policies apart says nothing of the metrics either.
    within = pl.col("spearman_within").fill_nan(None).mean()
    means = fidelity.group_by("metric", maintain_order=True).agg(within)
    ranked = means.sort("spearman_within", descending=True, nulls_last=True, maintain_order=True)
    return ranked["metric"].to_list()


def best_metric(fidelity: pl.DataFrame) -> str:
    """Name the first of `ranked_metrics` that the simulator measures."""
    return next(metric for metric in ranked_metrics(fidelity) if metric != LIVE_HALF)
