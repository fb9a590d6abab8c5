"""Tables of pages about the pretrained models, in Markdown, each made from stored results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from simulator.results.labels import told_apart
from simulator.results.layout import markdown_table
from simulator.results.metric_names import METRICS
from simulator.results.standings import standings
from simulator.results.tables import BUDGET, bootstrap, comparable
from validate.pretrained.stored import MODELS, stored_rows, waves_of

_LEVELS = {
    "rkv+wave": "layers only (`rkv+wave`)",
    "rkv+utility": "heads only (`rkv+utility`)",
    "reasonalloc": "both (`reasonalloc`)",
}


def _evicting(level: str, model: str) -> pl.DataFrame:
    (rows,) = told_apart(comparable(stored_rows(level, model)).filter(pl.col("n_evictions") > 0))
    return rows.sort("budget_unit", "budget_asked", maintain_order=True, descending=[True, False])


def _divergence(model: str, metric: str = "kl_mean") -> str:
    """Rank policies by their divergence, budget by budget; bold where not told apart from the least."""
    rows = _evicting("masked", model)
    budgets = rows["budget"].unique(maintain_order=True).to_list()
    found = standings(rows, metric).join(rows.select(*BUDGET, "budget").unique(), on=BUDGET)
    cells: dict[str, dict[str, str]] = {}
    for own in found.iter_rows(named=True):
        told = f"{own['mean']:.3f}"
        cells.setdefault(own["policy"], {})[own["budget"]] = f"**{told}**" if own["is_tied"] else told
    ranked = found.group_by("policy").agg(pl.col("mean").log().mean()).sort("mean")["policy"].to_list()
    return markdown_table(
        ["policy", *budgets],
        [[f"`{name}`", *(cells[name].get(budget, "") for budget in budgets)] for name in ranked],
    )


def _levels() -> str:
    """Tell what each of ReasonAlloc's levels changes against uniform R-KV, with paired intervals."""
    rng = np.random.default_rng(0)
    head: list[str] = []
    table = []
    for model in MODELS:
        rows = _evicting("masked", model)
        base = rows.filter(policy="rkv").select("budget", "trace_id", base="kl_mean")
        joined = rows.join(base, on=["budget", "trace_id"])
        budgets = rows["budget"].unique(maintain_order=True).to_list()
        head = head or ["model", "divergence less R-KV's, in percent of it", *budgets]
        for policy, label in _LEVELS.items():
            told = []
            for budget in budgets:
                own = joined.filter(policy=policy, budget=budget)
                low, high = bootstrap((own["kl_mean"] - own["base"]).to_numpy(), rng, 2000)
                usual = own["base"].to_numpy().mean()
                mean = own["kl_mean"].to_numpy().mean() - usual
                text = f"{100 * mean / usual:+.0f} ({100 * low / usual:+.0f} to {100 * high / usual:+.0f})"
                told.append(text if low <= 0 <= high else f"**{text}**")
            table.append([model, label, *told])
    return markdown_table(head, table)


def _means(model: str, level: str = "masked") -> pl.DataFrame:
    """Average rows over texts: one row per policy and budget."""
    numbers = [*METRICS, "kl_mean", "kl_p95", "top_changed"]
    rows = _evicting(level, model)
    return rows.group_by("policy", "budget", maintain_order=True).agg(pl.col(numbers).mean())


def _predictors() -> str:
    """Tell how each number of a replay ranks policies by their measured divergence, within a budget."""
    table = []
    for metric, known in METRICS.items():
        told = []
        sign = -1 if known.more_is_better else 1
        for model in MODELS:
            means = _means(model)
            ranks = [
                float(spearmanr(sign * own[metric], own["kl_mean"]).statistic)
                for _, own in means.group_by("budget", maintain_order=True)
            ]
            over_all = float(spearmanr(sign * means[metric], means["kl_mean"]).statistic)
            told.append(f"{np.mean(ranks):.2f} ({min(ranks):.2f}), {over_all:.2f}")
        table.append([known.label, *told])
    return markdown_table(["the replay's number", *MODELS], table)


def _agreement() -> str:
    """Tell how alike two models rank the policies by divergence, budget by budget."""
    means = {model: _means(model) for model in MODELS}
    budgets = means[MODELS[0]]["budget"].unique(maintain_order=True).to_list()
    table = []
    for one, other in combinations(MODELS, 2):
        joined = means[one].join(means[other], on=["policy", "budget"], suffix="_other")
        told = []
        for budget in budgets:
            own = joined.filter(budget=budget)
            told.append(f"{spearmanr(own['kl_mean'], own['kl_mean_other']).statistic:.2f}")
        table.append([f"{one}, {other}", *told])
    return markdown_table(["Spearman of mean divergences", *budgets], table)


def _stability() -> str:
    """Tell how alike the waves of different kinds of text are, and where the demand lies."""
    table = []
    for model in MODELS:
        waves = waves_of(model)
        shares = {kind: np.array(wave.demand) / sum(wave.demand) for kind, wave in waves.items()}
        alike = [
            float(spearmanr(shares[one], shares[other]).statistic) for one, other in combinations(shares, 2)
        ]
        usual = np.mean(list(shares.values()), axis=0) * len(next(iter(shares.values())))
        thirds = [float(part.mean()) for part in np.array_split(usual, 3)]
        table.append(
            [
                model,
                f"{np.mean(alike):.2f} ({min(alike):.2f})",
                f"{usual[0]:.2f}",
                *(f"{third:.2f}" for third in thirds),
                f"{usual[-1]:.2f}",
            ]
        )
    head = ["model", "Spearman between kinds of text: mean (least)", "first layer"]
    return markdown_table([*head, "first third", "middle third", "last third", "last layer"], table)


TABLES: dict[str, Callable[[], str]] = {
    **{f"divergence-{model.replace('.', '-')}": partial(_divergence, model) for model in MODELS},
    **{
        f"top-changed-{model.replace('.', '-')}": partial(_divergence, model, "top_changed")
        for model in MODELS
    },
    "pretrained-levels": _levels,
    "pretrained-predictors": _predictors,
    "pretrained-agreement": _agreement,
    "wave-stability": _stability,
}
