"""Tables of what a replay's numbers foretell of the measured divergence, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import polars as pl

from simulator.results.layout import markdown_table
from simulator.results.metric_names import COMPARED, METRICS, SHIFT, Metric
from simulator.results.ranking import spearman
from validate.pretrained.judge import (
    Standing,
    ceiling,
    judged,
    line_of,
    of_side,
    on_line,
    predicted_elsewhere,
    predicted_means,
    split,
)
from validate.pretrained.stored import (
    FOUND,
    SIZES,
    evicting_rows,
    mean_rows,
    models_with,
    ranks_within,
    shifted_rows,
)

_SOME = ("lost_lookup_rate", "mass_mean")
_BESIDE_SHIFT = (SHIFT, "mass_mean", "mass_p05", "lost_lookup_rate", "miss_rate")
_CEILING = "*half of the texts, measured*"


def _predictors(metrics: Sequence[str] = tuple(METRICS)) -> str:
    """Tell how each number of a replay ranks policies by their measured divergence, within a budget."""
    means = {model: mean_rows(model) for model in models_with("masked")}
    table = []
    for known in map(METRICS.__getitem__, metrics):
        table.append([known.label, *(_ranks(own, known) for own in means.values())])
    halves = [ceiling(evicting_rows("masked", model), "all") for model in means]
    told = [f"{np.mean(own.within):.2f} ({min(own.within):.2f}), {own.over_all:.2f}" for own in halves]
    return markdown_table(["the replay's number", *means], [*table, [_CEILING, *told]])


def _shifts() -> str:
    """Tell how the shift ranks policies by their divergence, beside other numbers on the same texts."""
    rows = {model: shifted_rows(model) for model in models_with("shift")}
    found = _standings(rows, _BESIDE_SHIFT, "all")
    table = []
    for label, each in found.items():
        told = []
        for own in each:
            within = f"{np.mean(own.within):.2f} ({min(own.within):.2f})"
            told += [within, f"{own.over_all:.2f}", f"{100 * np.mean(own.regret):.0f}"]
        table.append([label, *told])
    heads = ("within a budget", "over all cells", "regret, %")
    return markdown_table(
        [
            "",
            *(
                f"{SIZES[model]}, {own['trace'].n_unique()} texts: {head}"
                for model, own in rows.items()
                for head in heads
            ),
        ],
        table,
    )


def _standings(
    rows: Mapping[str, pl.DataFrame], numbers: Sequence[str], side: str
) -> dict[str, list[Standing]]:
    """Judge numbers by the rows of every model, and what half of the texts say; by label."""
    known = [COMPARED[name] for name in numbers]
    found = {
        number.label: [
            judged(own, number.column, more_is_better=number.more_is_better, side=side)
            for own in rows.values()
        ]
        for number in known
    }
    return found | {_CEILING: [ceiling(own, side) for own in rows.values()]}


def _calibrated() -> str:
    """Hold predicted divergence against measured, of policies and texts that no line was fitted on."""
    rows = {model: shifted_rows(model) for model in models_with("shift")}
    lines = {model: line_of(of_side(own, "fitted")) for model, own in rows.items()}
    first = next(model for model in split()["models"]["fitted"] if model in rows)
    table = []
    for model, own in rows.items():
        slope, intercept, spread = lines[model]
        text = f"{np.exp(intercept):.2f} x shift^{slope:.2f}, a factor of {np.exp(1.96 * spread):.1f}"
        told = [text, _predicted_over_measured(predicted_elsewhere(own))]
        by_first = of_side(own, "judged").with_columns(predicted=on_line(lines[first]))
        told.append("" if model == first else _predicted_over_measured(by_first))
        table.append([model, *told])
    head = "predicted over measured, judged policies on left-out texts: median (5% to 95%)"
    fitted = "line through the fitted policies, 95% of single texts within"
    return markdown_table(["model", fitted, head, f"the same by the line of {first}"], table)


def _left_over() -> str:
    """Tell what the line of each model leaves over, by policy: measured over predicted, over all budgets."""
    ratio = (pl.col("kl_mean") / pl.col("predicted")).log().mean().exp()
    models = models_with("shift")
    found = {
        model: dict(predicted_means(model).group_by("policy").agg(ratio=ratio).iter_rows())
        for model in models
    }
    ranked = sorted(found[models[0]], key=lambda policy: np.prod([own[policy] for own in found.values()]))
    return markdown_table(
        ["measured over predicted", *models],
        [
            [name if name == FOUND else f"`{name}`", *(f"{own[name]:.2f}" for own in found.values())]
            for name in ranked
        ],
    )


def _predicted_over_measured(rows: pl.DataFrame) -> str:
    means = rows.group_by("policy", "budget").agg(pl.col("predicted", "kl_mean").mean())
    ratio = (means["predicted"] / means["kl_mean"]).to_numpy()
    return f"{np.median(ratio):.2f} ({np.quantile(ratio, 0.05):.2f} to {np.quantile(ratio, 0.95):.2f})"


def _ranks(means: pl.DataFrame, number: Metric) -> str:
    """Correlate a number with the divergence: within a budget, mean and (least), then over all cells."""
    sign = -1 if number.more_is_better else 1
    ranks = ranks_within(means, number)
    over_all = spearman(sign * means[number.column], means["kl_mean"])
    return f"{np.mean(ranks):.2f} ({min(ranks):.2f}), {over_all:.2f}"


def _judged(level: str, numbers: Sequence[str]) -> str:
    """Tell how numbers stand on models and policies that none was chosen on, and what is the most to hope."""
    models = [model for model in split()["models"]["judged"] if model in models_with(level)]
    rows = {
        model: shifted_rows(model) if level == "shift" else evicting_rows(level, model) for model in models
    }
    table = []
    for label, each in _standings(rows, numbers, "judged").items():
        told = []
        for own in each:
            within = f"{np.mean(own.within):.2f} ({own.interval[0]:.2f} to {own.interval[1]:.2f})"
            pairs = f"{100 * own.pairs[0] / own.pairs[1]:.0f}"
            told += [within, f"{own.over_all:.2f}", pairs, f"{100 * np.mean(own.regret):.0f}"]
        table.append([label, *told])
    heads = ("within a budget", "over all cells", "pairs, %", "regret, %")
    return markdown_table(
        ["the replay's number", *(f"{SIZES[model]}: {head}" for model in models for head in heads)], table
    )


FORETOLD: dict[str, Callable[[], str]] = {
    "pretrained-predictors": _predictors,
    "pretrained-predictors-some": partial(_predictors, _SOME),
    "pretrained-judged": partial(_judged, "masked", tuple(METRICS)),
    "pretrained-shift": _shifts,
    "pretrained-shift-judged": partial(_judged, "shift", _BESIDE_SHIFT),
    "pretrained-calibration": _calibrated,
    "pretrained-left-over": _left_over,
}
