"""How well a number foretells divergence on models and policies that none was chosen on.

``split.json`` says which those are. It was written before any number was made for the purpose; whoever
proposes one looks at the judged side once, and says so under ``openings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from simulator.results.calibration import line
from simulator.results.ranking import spearman
from simulator.results.tables import bootstrap
from traces.documents import read_json
from validate.pretrained.stored import HOME, shifted_rows

_RESAMPLES = 500
_TRUTH = "kl_mean"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a number stands against the truth, both of the same policies at the same budgets.

    Attributes
    ----------
    within : tuple of float
        Spearman correlation over policies at each budget.
    interval : tuple of float
        95% of the mean of ``within``, bootstrapped over texts.
    over_all : float
        Spearman correlation over all policies and budgets.
    pairs : tuple of int
        Of two policies at one budget whose measured difference has a 95% interval without 0: how many the
        number puts in the right order, and how many there are.
    regret : tuple of float
        At each budget, how much more divergence than the least the policy has that the number puts first, as
        a share of the least.
    """

    within: tuple[float, ...]
    interval: tuple[float, float]
    over_all: float
    pairs: tuple[int, int]
    regret: tuple[float, ...]


@cache
def split() -> dict[str, Any]:
    """Read which policies and models numbers are made on, which they are judged on, and who has looked."""
    found: dict[str, Any] = read_json(HOME / "split.json", "split.json", dict[str, Any])
    return found


def judged(rows: pl.DataFrame, number: str, *, more_is_better: bool, side: str = "judged") -> Standing:
    """Hold a column of a model's rows against the measured divergence.

    Parameters
    ----------
    rows : polars.DataFrame
        Of `stored.evicting_rows` or `stored.shifted_rows`.
    number : str
        A column.
    more_is_better : bool
    side : str
        Of the policies: ``judged``, ``fitted`` or ``all``.
    """
    sign = -1 if more_is_better else 1
    cells = [(truth, sign * foretold) for truth, foretold in _by_budget(rows, number, side)]
    rng = np.random.default_rng(0)
    drawn = []
    for truth, foretold in cells:
        n_texts = truth.shape[1]
        counts = rng.multinomial(n_texts, np.full(n_texts, 1 / n_texts), size=_RESAMPLES).T
        drawn.append(spearman(truth @ counts, foretold @ counts))
    return _standing(cells, [_told_apart(truth, rng) for truth, _ in cells], np.mean(drawn, axis=0))


def ceiling(rows: pl.DataFrame, side: str = "judged", halvings: int = 100) -> Standing:
    """Hold the divergence of one half of the texts against that of the other: means over random halvings.

    ``rows`` and ``side`` are as of `judged`.
    """
    rng = np.random.default_rng(0)
    cells = [truth for truth, _ in _by_budget(rows, _TRUTH, side)]
    told = [_told_apart(truth, rng) for truth in cells]
    found = []
    for _ in range(halvings):
        halves = []
        for truth in cells:
            order = rng.permutation(truth.shape[1])
            middle = len(order) // 2
            halves.append((truth[:, order[middle:]], truth[:, order[:middle]]))
        found.append(_standing(halves, told, np.zeros(1)))
    within = np.array([own.within for own in found])
    right, n_told = np.array([own.pairs for own in found]).sum(axis=0).tolist()
    return Standing(
        within=tuple(within.mean(axis=0).tolist()),
        interval=_interval(within.mean(axis=1)),
        over_all=float(np.mean([own.over_all for own in found])),
        pairs=(right, n_told),
        regret=tuple(np.mean([own.regret for own in found], axis=0).tolist()),
    )


def _by_budget(rows: pl.DataFrame, number: str, side: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give the truth and a number of every budget; float64 (n_policies, n_texts) each."""
    for _, own in of_side(rows, side).group_by("budget", maintain_order=True):
        wide = own.sort("policy", "trace_id")
        n_policies = wide["policy"].n_unique()
        yield (
            wide[_TRUTH].to_numpy().reshape(n_policies, -1),
            wide[number].to_numpy().reshape(n_policies, -1),
        )


def of_side(rows: pl.DataFrame, side: str) -> pl.DataFrame:
    """Keep rows of policies that numbers are made on, ``fitted``, or judged on, ``judged``, or ``all``."""
    known = split()["policies"]
    policies = known[side] if side in known else [*known["fitted"], *known["judged"]]
    return rows.filter(pl.col("policy").is_in(policies))


def _told_apart(truth: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """List the pairs of policies whose difference has an interval without 0."""
    pairs = []
    for one, other in combinations(range(len(truth)), 2):
        low, high = bootstrap(truth[one] - truth[other], rng, _RESAMPLES)
        if not low <= 0 <= high:
            pairs.append((one, other))
    return pairs


def _standing(
    cells: Sequence[tuple[np.ndarray, np.ndarray]],
    told: Sequence[list[tuple[int, int]]],
    drawn: np.ndarray,
) -> Standing:
    """Compare truth and number at every budget; ``drawn`` are resampled means of the correlations."""
    means = [(truth.mean(axis=1), foretold.mean(axis=1)) for truth, foretold in cells]
    right = [
        (truth[one] < truth[other]) == (foretold[one] < foretold[other])
        for (truth, foretold), pairs in zip(means, told, strict=True)
        for one, other in pairs
    ]
    return Standing(
        within=tuple(spearman(*own) for own in means),
        interval=_interval(drawn),
        over_all=spearman(*(np.concatenate(own) for own in zip(*means, strict=True))),
        pairs=(int(np.sum(right)), len(right)),
        regret=tuple(float(truth[foretold.argmin()] / truth.min() - 1) for truth, foretold in means),
    )


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def predicted_elsewhere(rows: pl.DataFrame) -> pl.DataFrame:
    """Predict every text's divergence under the judged policies from the fitted ones on all other texts.

    Parameters
    ----------
    rows : polars.DataFrame
        Of `stored.shifted_rows`.

    Returns
    -------
    polars.DataFrame
        Its rows of the judged policies, with ``predicted`` in nats.
    """
    fitted, found = of_side(rows, "fitted"), []
    for (text,), own in of_side(rows, "judged").group_by("trace", maintain_order=True):
        others = fitted.filter(pl.col("trace") != text)
        found.append(own.with_columns(predicted=on_line(line_of(others))))
    return pl.concat(found)


def predicted_means(model: str) -> pl.DataFrame:
    """Average what the fitted policies' line predicts beside what was measured.

    Returns
    -------
    polars.DataFrame
        policy, budget, predicted and kl_mean in nats; ``is_judged``, whether the line is of other policies
        and other texts.
    """
    rows = shifted_rows(model)
    fitted = of_side(rows, "fitted")
    found = [
        fitted.with_columns(predicted=on_line(line_of(fitted)), is_judged=False),
        predicted_elsewhere(rows).with_columns(is_judged=True),
    ]
    means = pl.concat(found, how="diagonal").group_by("policy", "budget", "is_judged", maintain_order=True)
    return means.agg(pl.col("predicted", "kl_mean").mean())


def line_of(rows: pl.DataFrame) -> tuple[float, float, float]:
    """Fit `simulator.results.calibration.line` to the shifts and the divergence of rows."""
    return line(*(rows[name].to_numpy() for name in ("shift_mean", "kl_mean")))


def on_line(found: tuple[float, float, float]) -> pl.Expr:
    """Give the divergence that a line of `line_of` predicts for the shift of a row."""
    slope, intercept, _ = found
    return np.exp(intercept) * pl.col("shift_mean") ** slope
