"""Tables of pages about the pretrained models, in Markdown, each made from stored results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import polars as pl

from simulator.results.labels import with_budget_label
from simulator.results.layout import markdown_table
from simulator.results.ranking import spearman
from simulator.results.standings import standings
from simulator.results.tables import BUDGET, bootstrap
from validate.live.accuracy import mean_interval
from validate.pretrained.foretold_tables import FORETOLD
from validate.pretrained.protection_tables import PROTECTED
from validate.pretrained.searched_tables import SEARCHED
from validate.pretrained.stored import (
    FOUND,
    MODELS,
    SIZES,
    evicting_rows,
    graded_divergence,
    graded_rows,
    mean_rows,
    models_with,
    reasoner_errors,
    waves_of,
)

_RESAMPLES = 2000
_GRADED = "qwen2.5-coder-0.5b"
_LEVELS = {
    "rkv+wave": "layers only (`rkv+wave`)",
    "rkv+utility": "heads only (`rkv+utility`)",
    "reasonalloc": "both (`reasonalloc`)",
}


def _divergence(model: str, metric: str = "kl_mean") -> str:
    """Rank policies by their divergence, budget by budget; bold where not told apart from the least."""
    rows = evicting_rows("masked", model)
    return _ranked(_told(rows, metric), rows["budget"].unique(maintain_order=True).to_list())


def _divergence_of_all(budgets: Sequence[str] = ("10%", "20%")) -> str:
    """Rank policies by their divergence on all models, at the budgets that all texts were run at."""
    found = [
        _told(evicting_rows("masked", model).filter(pl.col("budget").is_in(budgets))).with_columns(
            budget=pl.lit(f"{SIZES[model]}, ") + pl.col("budget")
        )
        for model in models_with("masked")
    ]
    return _ranked(pl.concat(found), pl.concat(found)["budget"].unique(maintain_order=True).sort().to_list())


def _told(rows: pl.DataFrame, metric: str = "kl_mean") -> pl.DataFrame:
    """Give every policy's standing, with the budget as rows name it."""
    return standings(rows, metric).join(rows.select(*BUDGET, "budget").unique(), on=BUDGET)


def _ranked(found: pl.DataFrame, budgets: Sequence[str]) -> str:
    """Lay standings out by policy and budget, policies by the geometric mean of their numbers."""
    cells: dict[str, dict[str, str]] = {}
    for own in found.iter_rows(named=True):
        told = f"{own['mean']:.3f}"
        cells.setdefault(own["policy"], {})[own["budget"]] = f"**{told}**" if own["is_tied"] else told
    ranked = found.group_by("policy").agg(pl.col("mean").log().mean()).sort("mean")["policy"].to_list()
    return markdown_table(
        ["policy", *budgets],
        [
            [name if name == FOUND else f"`{name}`", *(cells[name].get(budget, "") for budget in budgets)]
            for name in ranked
        ],
    )


def _texts() -> str:
    """Count the texts behind every budget's numbers."""
    budgets = _budgets()
    table = []
    for model in models_with("masked"):
        rows = evicting_rows("masked", model)
        counts = dict(rows.group_by("budget").agg(pl.col("trace_id").n_unique()).iter_rows())
        table.append([model, *(str(counts.get(budget, "")) for budget in budgets)])
    return markdown_table(["texts", *budgets], table)


def _budgets() -> list[str]:
    """List the budgets of all models, shares first."""
    rows = pl.concat(
        evicting_rows("masked", model).select(*BUDGET, "budget") for model in models_with("masked")
    )
    rows = rows.unique()
    return rows.sort(pl.col("budget_unit") != "%", "budget_asked")["budget"].to_list()


def _levels() -> str:
    """Tell what each of ReasonAlloc's levels changes against uniform R-KV, with paired intervals."""
    rng = np.random.default_rng(0)
    table = []
    for model in models_with("masked"):
        rows = evicting_rows("masked", model)
        base = rows.filter(policy="rkv").select("budget", "trace_id", base="kl_mean")
        joined = rows.join(base, on=["budget", "trace_id"])
        for budget in rows["budget"].unique(maintain_order=True):
            told = []
            for policy in _LEVELS:
                own = joined.filter(policy=policy, budget=budget)
                difference = (own["kl_mean"] - own["base"]).to_numpy()
                low, high = bootstrap(difference, rng, _RESAMPLES)
                percent = [
                    100 * value / own["base"].to_numpy().mean() for value in (difference.mean(), low, high)
                ]
                text = "{:+.0f} ({:+.0f} to {:+.0f})".format(*percent)
                told.append(text if low <= 0 <= high else f"**{text}**")
            table.append([model, budget, *told])
    return markdown_table(["model", "budget", *_LEVELS.values()], table)


def _agreement() -> str:
    """Tell how alike two models rank the policies by divergence, and the small reasoner by wrong answers."""
    means, budgets = {model: mean_rows(model) for model in models_with("masked")}, _budgets()
    pairs = [
        (f"{one}, {other}", means[one], means[other], "kl_mean") for one, other in combinations(means, 2)
    ]
    errors = reasoner_errors()
    pairs += [
        (f"{model}, wrong answers of the small reasoner", means[model], errors, "errors") for model in means
    ]
    table = []
    for label, one, other, against in pairs:
        joined = one.join(other.select("policy", "budget", against=against), on=["policy", "budget"])
        told = []
        for budget in budgets:
            own = joined.filter(budget=budget)
            alike = spearman(own["kl_mean"], own["against"]) if len(own) else None
            told.append("" if alike is None else f"{alike:.2f} ({len(own)})")
        table.append([label, *told])
    return markdown_table(["Spearman (policies)", *budgets], table)


def _stability() -> str:
    """Tell how alike the waves of different kinds of text are, and where the demand lies."""
    table = []
    for model in MODELS:
        waves = waves_of(model)
        shares = {kind: np.array(wave.demand) / sum(wave.demand) for kind, wave in waves.items()}
        alike = [spearman(shares[one], shares[other]) for one, other in combinations(shares, 2)]
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


def _graded(model: str) -> str:
    """Tell right answers beside the full cache's and R-KV's, and divergence on texts of the same problems."""
    rng = np.random.default_rng(0)
    rows = graded_rows(model).with_columns(pl.col("right").cast(pl.Int8))
    evicting = pl.col("budget_asked").is_not_null()
    full, rkv = rows.filter(~evicting), rows.filter(evicting, policy="rkv")

    def less(own: pl.DataFrame, other: pl.DataFrame) -> str:
        paired = own.join(other.select("problem", other="right"), on="problem")
        difference = (paired["right"] - paired["other"]).to_numpy()
        values = (difference.mean(), *mean_interval(difference, rng, lowest=-1.0))
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values))

    levels = graded_divergence(model).group_by("policy", "level").agg(pl.col("kl_mean").mean())
    table = [["full cache", f"{100 * full['right'].to_numpy().mean():.1f}", "", "", "0", "0"]]
    shares = rows.filter(evicting).group_by("policy").agg(pl.col("right").mean())
    for policy, share in shares.sort("right", "policy", descending=True).iter_rows():
        own = rows.filter(evicting, policy=policy)
        told = [f"{100 * share:.1f}", less(own, full), "" if policy == "rkv" else less(own, rkv)]
        for level in ("masked", "forced"):
            told.append(f"{levels.filter(policy=policy, level=level)['kl_mean'].item():.3f}")
        table.append([f"`{policy}`", *told])
    head = [f"of {len(full)} problems", "right, %", "less the full cache's, points", "less R-KV's, points"]
    return markdown_table([*head, "masked divergence", "forced divergence"], table)


def _drift() -> str:
    """Tell how far masked and forced divergence are apart, on the texts that both were run on."""
    pairs = [
        (model, evicting_rows("forced", model), evicting_rows("masked", model))
        for model in models_with("forced")
    ]
    graded = with_budget_label(graded_divergence(_GRADED))
    by_level = {level: graded.filter(level=level) for level in ("forced", "masked")}
    pairs.append((f"{_GRADED}, graded texts", by_level["forced"], by_level["masked"]))
    table = []
    for label, forced, masked in pairs:
        # By the text: recorded on another machine, its numbers and so its id are not the same.
        key = ["policy", "policy_params", "budget", "trace"]
        both = forced.join(masked, on=key, suffix="_masked")
        means = both.group_by("policy", "budget").agg(pl.col("kl_mean", "kl_mean_masked").mean())
        ratio = (both["kl_mean"] / both["kl_mean_masked"]).to_numpy()
        ranks = [
            spearman(own["kl_mean"], own["kl_mean_masked"])
            for _, own in means.group_by("budget", maintain_order=True)
        ]
        table.append(
            [
                label,
                f"{both['trace'].n_unique()}, {len(means)}",
                f"{np.median(ratio):.2f} ({np.quantile(ratio, 0.05):.2f} to {np.quantile(ratio, 0.95):.2f})",
                f"{spearman(both['kl_mean'], both['kl_mean_masked']):.3f}",
                f"{np.mean(ranks):.2f} ({min(ranks):.2f})",
            ]
        )
    head = [
        "model",
        "texts, cells",
        "forced over masked divergence: median (5% to 95%)",
        "Spearman over all rows",
    ]
    return markdown_table([*head, "of policies within a budget: mean (least)"], table)


TABLES: dict[str, Callable[[], str]] = {
    **{f"divergence-{model.replace('.', '-')}": partial(_divergence, model) for model in MODELS},
    **{
        f"top-changed-{model.replace('.', '-')}": partial(_divergence, model, "top_changed")
        for model in MODELS
    },
    "divergence-of-all": _divergence_of_all,
    "pretrained-texts": _texts,
    "pretrained-levels": _levels,
    "pretrained-agreement": _agreement,
    "wave-stability": _stability,
    "graded": partial(_graded, _GRADED),
    "masked-forced": _drift,
    **FORETOLD,
    **SEARCHED,
    **PROTECTED,
}
