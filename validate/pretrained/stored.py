"""The stored results of the pretrained models, read back."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import polars as pl

from simulator.policies.wave import Wave, read_wave
from simulator.results.labels import with_budget_label
from simulator.results.metric_names import METRICS, Metric
from simulator.results.ranking import spearman
from simulator.results.store import read_table
from simulator.results.tables import comparable, with_budget_kind
from traces.errors import UserError
from validate.models.pretrained import pretrained_models

HOME = Path(str(resources.files("validate.pretrained")))
MODELS = tuple(pretrained_models())
FOUND = "found by search"
# What tables call the models.
SIZES = {"smollm2-135m": "0.1B", "qwen2.5-coder-0.5b": "0.5B", "qwen2.5-coder-1.5b": "1.5B"}


def models_with(level: str) -> list[str]:
    """List the models of which rows of a level are stored."""
    return [model for model in MODELS if _place(level, model).is_file()]


def _place(level: str, model: str) -> Path:
    return HOME / "results" / f"{level}-{model}.parquet"


def stored_rows(level: str, model: str) -> pl.DataFrame:
    """Read the rows of a level, ``masked`` or ``forced``, on all texts of a model.

    Raises
    ------
    UserError
        If none are stored.
    """
    path = _place(level, model)
    if not path.is_file():
        there = sorted(own.stem.removeprefix(f"{level}-") for own in path.parent.glob(f"{level}-*.parquet"))
        raise UserError(f"no rows of {level} are stored for '{model}'; allowed: {', '.join(there)}")
    return with_budget_label(with_budget_kind(read_table(path, str(path), {})))


def evicting_rows(level: str, model: str) -> pl.DataFrame:
    """Read the rows of policies that evicted something, on texts that all of a budget share.

    Policies go by their names; the one that a search found on the reasoner is `FOUND`.
    """
    rows = comparable(stored_rows(level, model)).filter(pl.col("n_evictions") > 0)
    window = pl.col("policy_params").str.json_path_match("$.window")
    is_found = (pl.col("policy") == "rkv+cake") & (window != "8")
    rows = rows.with_columns(policy=pl.when(is_found).then(pl.lit(FOUND)).otherwise("policy"))
    in_shares = pl.col("budget_unit") == "%"
    return rows.sort(~in_shares, "budget_asked", maintain_order=True)


def shifted_rows(model: str) -> pl.DataFrame:
    """Read rows of texts with sensitivities, with the ``kl_mean`` that was measured on the same texts.

    Those were recorded apart, so they are joined by name: their numbers are not the same to the bit.
    """
    key = ["policy", "policy_params", "budget", "trace"]
    truth = evicting_rows("masked", model).select(*key, "kl_mean")
    return evicting_rows("shift", model).join(truth, on=key, maintain_order="left")


def mean_rows(model: str) -> pl.DataFrame:
    """Average a replay's numbers and the masked divergence over texts; one row per policy and budget."""
    rows = evicting_rows("masked", model)
    return rows.group_by("policy", "budget", maintain_order=True).agg(pl.col(*METRICS, "kl_mean").mean())


def ranks_within(means: pl.DataFrame, number: Metric) -> list[float]:
    """Correlate a number with the divergence over policies, Spearman, at each budget of rows of means."""
    sign = -1 if number.more_is_better else 1
    return [
        spearman((sign * own[number.column]).to_numpy(), own["kl_mean"].to_numpy())
        for _, own in means.group_by("budget", maintain_order=True)
    ]


def mean_divergence(model: str) -> pl.DataFrame:
    """Average the divergence over texts; one row per policy and share of the full cache."""
    rows = evicting_rows("masked", model).filter(budget_unit="%")
    return rows.group_by("policy", "budget", "budget_asked", maintain_order=True).agg(
        pl.col("kl_mean").mean()
    )


def reasoner_errors() -> pl.DataFrame:
    """Read the small reasoner's share of wrong answers, over all families: policy, budget, ``errors``."""
    path = HOME.parent / "reasoner" / "results" / "accuracy.csv"
    evicting = pl.col("budget_asked").is_not_null()
    rows = with_budget_kind(read_table(path, str(path), {})).filter(evicting, family="all")
    return with_budget_label(rows).select("policy", "budget", errors=1 - pl.col("accuracy"))


def graded_rows(model: str, level: str = "graded") -> pl.DataFrame:
    """Read what a model answered under every policy and budget, one row per problem.

    ``level`` is ``graded``, or ``searched-graded`` for what a search found.

    Raises
    ------
    UserError
        If nothing is stored.
    """
    path = _place(level, model)
    return with_budget_label(read_table(path, str(path), {}))


def graded_divergence(model: str) -> pl.DataFrame:
    """Read masked and forced rows on texts of the graded problems, at the budget that they were graded at."""
    places = [_place(f"graded-{level}", model) for level in ("masked", "forced")]
    return pl.concat([read_table(path, str(path), {}) for path in places], how="diagonal_relaxed")


def waves_of(model: str) -> dict[str, Wave]:
    """Read a model's waves, one for each kind of text, as ``sim calibrate`` wrote them.

    Raises
    ------
    UserError
        If none is stored.
    """
    found = sorted((HOME / "results" / "waves").glob(f"{model}-on-*.json"))
    if not found:
        raise UserError(f"no wave is stored for '{model}'; allowed: {', '.join(MODELS)}")
    return {path.stem.rpartition("-on-")[2]: read_wave(path) for path in found}
