"""The measured tables that ship with the reference reasoner, read back and brought together."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import polars as pl

from simulator.results.labels import with_budget_label
from simulator.results.metric_names import COMPARED, METRICS, SHIFT
from simulator.results.store import read_table
from simulator.results.tables import with_budget_kind
from traces.documents import parse_json
from traces.errors import UserError
from validate.live.accuracy import ALL_FAMILIES, CELL
from validate.live.fidelity import Cells

_HOME = resources.files("validate") / "reasoner"
MODEL, PARAMETERS = "kvbudget-reasoner-v2", "2.3 M"


def result_table(name: str) -> pl.DataFrame:
    """Read one of the stored tables, ``accuracy`` for ``results/accuracy.csv``.

    Raises
    ------
    UserError
        If there is no such table.
    """
    place = _HOME / "results"
    there = sorted(entry.name[:-4] for entry in place.iterdir() if entry.name.endswith(".csv"))
    if name not in there:
        raise UserError(f"table is '{name}'; allowed: {', '.join(there)}")
    with resources.as_file(place / f"{name}.csv") as path:
        return with_budget_kind(read_table(path, str(path), {}))


def stored_document(name: str) -> Any:
    """Read a JSON file that ships beside the tables, ``results/winners.json``."""
    return parse_json((_HOME / name).read_bytes(), name)


def stored_profile() -> dict[str, Any]:
    """Read the reference reasoner's profile, as `sim reasoner profile` wrote it."""
    found: dict[str, Any] = stored_document("weights/profile.json")
    return found


def judged_rows(others: bool = False) -> pl.DataFrame:
    """Join what the simulator foretold with the accuracy of decoding under eviction.

    With ``others``, of the eight policies that no number was chosen on, instead of the first nine.

    Returns
    -------
    polars.DataFrame
        One row per family, policy and budget: means of the replay's numbers (`simulator.results.means`), the
        shift of predictions on the same problems, and ``accuracy`` with its 95% interval ``low`` to ``high``.
    """
    suffix = "-others" if others else ""
    key = ["family", *CELL]
    accuracy = result_table(f"accuracy{suffix}").filter(
        pl.col("budget_asked").is_not_null() & (pl.col("family") != ALL_FAMILIES)
    )
    live = accuracy.select(*key, "n_problems", "accuracy", "low", "high")
    joined = result_table(f"simulated{suffix}").join(live, on=key, how="inner", maintain_order="left")
    shifts = result_table(f"shifts{suffix}").select(*key, SHIFT)
    return with_budget_label(joined.join(shifts, on=key, how="left", maintain_order="left"))


def cells_of(judged: pl.DataFrame) -> dict[str, Cells]:
    """Put rows of `judged_rows` in the form that `rank` and the charts of `validate.live` take.

    Every cell has one value, its mean: there is nothing to resample, so correlations come without intervals.
    """
    found = {}
    for (family,), own in judged.group_by("family", maintain_order=True):
        simulated = {
            name: own[name].to_numpy()[:, None] * (1 if metric.more_is_better else -1)
            for name, metric in (METRICS | {SHIFT: COMPARED[SHIFT]}).items()
        }
        found[str(family)] = Cells(own.select(CELL).rows(), simulated, own["accuracy"].to_numpy()[:, None])
    return dict(sorted(found.items()))


def differences(judged: pl.DataFrame, policy: str, columns: Sequence[str]) -> pl.DataFrame:
    """Return every other policy's shares less one policy's, from rows of `judged_rows`.

    Returns
    -------
    polars.DataFrame
        policy, budget and ``columns``: differences of means over families, in percentage points.
    """
    key = ["policy", "budget_asked", "budget"]
    means = judged.group_by(key, maintain_order=True).agg(pl.col(name).mean() * 100 for name in columns)
    base = means.filter(policy=policy).drop("policy", "budget_asked")
    joined = means.filter(pl.col("policy") != policy).join(base, on="budget", suffix="_base")
    less = [(pl.col(name) - pl.col(f"{name}_base")).alias(name) for name in columns]
    return joined.sort("policy", "budget_asked").select("policy", "budget", *less)


def choices(judged: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Take the policy that a number puts first in rows of `judged_rows`, and what it costs in accuracy.

    Returns
    -------
    polars.DataFrame
        family, budget; ``chosen`` and its accuracy ``gets``; ``best`` and its accuracy ``could``; ``regret``,
        the difference.

    Raises
    ------
    UserError
        For an unknown metric.
    """
    if metric not in METRICS:
        raise UserError(f"metric is '{metric}'; allowed: {', '.join(METRICS)}")
    first = (pl.col(metric) * (1 if METRICS[metric].more_is_better else -1)).arg_max()
    accuracy, most = pl.col("accuracy"), pl.col("accuracy").arg_max()
    costs = judged.group_by("family", "budget", "budget_asked", maintain_order=True).agg(
        chosen=pl.col("policy").get(first),
        gets=accuracy.get(first),
        best=pl.col("policy").get(most),
        could=accuracy.get(most),
        regret=accuracy.get(most) - accuracy.get(first),
    )
    return costs.sort("family", "budget_asked").drop("budget_asked")
