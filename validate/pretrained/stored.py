"""The stored results of the pretrained models, read back."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import polars as pl

from simulator.policies.wave import Wave, read_wave
from simulator.results.labels import with_budget_label
from simulator.results.store import read_table
from simulator.results.tables import with_budget_kind
from traces.errors import UserError
from validate.models.pretrained import pretrained_models

HOME = Path(str(resources.files("validate.pretrained")))
MODELS = tuple(pretrained_models())


def stored_rows(level: str, model: str) -> pl.DataFrame:
    """Read the rows of a level, ``masked`` or ``forced``, on all texts of a model.

    Raises
    ------
    UserError
        If none are stored.
    """
    path = HOME / "results" / f"{level}-{model}.parquet"
    if not path.is_file():
        raise UserError(f"no rows of {level} are stored for '{model}'; allowed: {', '.join(MODELS)}")
    return with_budget_label(with_budget_kind(read_table(path, str(path), {})))


def stored_table(name: str) -> pl.DataFrame:
    """Read a stored table, ``accuracy`` for ``results/accuracy.csv``; raises UserError if it is missing."""
    path = HOME / "results" / f"{name}.csv"
    return read_table(path, str(path), {})


def waves_of(model: str) -> dict[str, Wave]:
    """Read a model's waves, one for each kind of text, as ``sim calibrate`` wrote them."""
    found = sorted((HOME / "results" / "waves").glob(f"{model}-on-*.json"))
    return {path.stem.rpartition("-on-")[2]: read_wave(path) for path in found}
