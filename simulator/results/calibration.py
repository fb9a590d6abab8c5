"""What a shift of predictions is in nats of divergence: measured once per model, and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
from msgspec import Meta

from simulator.results.tables import GROUP
from traces.errors import MissingDataError, UserError
from traces.stamped import Stamp
from traces.trace import Trace
from traces.wording import tell_of_other_models

_STAMP = Stamp("kvbudget-calibration", 1, "calibration", "sim validate calibrate", MissingDataError)
_SHIPPED = Path(__file__).parent / "calibrations"
# Of one text the same policy at the same budget.
_CELL = [*GROUP, "trace"]
Above0 = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Calibration:
    """The divergence that a model's shifts came with: ``exp(intercept) * shift ** slope``.

    Attributes
    ----------
    model, model_revision : str
    n_draws : int
        Of the sensitivities that shifts are from.
    slope, intercept : float
        A line through the logarithms of both, moved so that means agree.
    spread : float
        Standard deviation of the logarithm of what was measured over what the line says, text by text.
    least, most : float
        The shifts that it was measured at; beyond them nothing is predicted.
    policies : tuple of str
    text_ids : tuple of str
        Of the texts, see `text_id`; on these nothing is predicted.
    n_rows : int
    """

    model: str
    model_revision: str
    n_draws: Annotated[int, Meta(ge=1)]
    slope: Above0
    intercept: float
    spread: Annotated[float, Meta(ge=0)]
    least: Above0
    most: Above0
    policies: tuple[str, ...]
    text_ids: tuple[str, ...]
    n_rows: Annotated[int, Meta(ge=1)]

    def divergence(self, shift: float) -> float | None:
        """Give the mean divergence in nats; 0 where nothing shifts, None where nothing was measured."""
        if shift == 0:
            return 0.0
        if not self.least <= shift <= self.most:
            return None
        return float(np.exp(self.intercept) * shift**self.slope)

    def write(self, path: str | Path) -> None:
        """Write it as JSON with a digest of itself, atomically."""
        _STAMP.write(path, self)


def read_calibration(path: str | Path) -> Calibration:
    """Read a stored calibration.

    Raises
    ------
    MissingDataError
        If the file is missing, changed, or is no calibration of this version.
    """
    found: Calibration = _STAMP.read(path, Calibration)
    return found


def known_calibrations(paths: Sequence[str | Path] = ()) -> dict[str, Calibration]:
    """Collect the calibrations that ship with the package and those given, which win; by model name."""
    return _shipped() | {own.model: own for own in map(read_calibration, paths)}


def tell_unused(paths: Sequence[str | Path], models: Iterable[str]) -> None:
    """Say on standard error which calibrations are of no model at hand, and so tell nothing."""
    of_others = {f"calibration {path}": read_calibration(path).model for path in paths}
    tell_of_other_models(of_others, models)


@cache
def _shipped() -> dict[str, Calibration]:
    return {own.model: own for own in map(read_calibration, sorted(_SHIPPED.glob("*.json")))}


def text_id(trace: Trace) -> str:
    """Give a digest of a trace's tokens, which a recording on another machine has too; hexadecimal."""
    return hashlib.sha256(np.array(trace.token_ids, "<i8").tobytes()).hexdigest()


def predicted_divergence(trace: Trace, shift: float | None, known: Mapping[str, Calibration]) -> float | None:
    """Give the divergence that a shift on a trace came with elsewhere, in nats.

    None where no calibration speaks of it: of the model in this revision, with as many draws, from other
    texts, at such a shift.
    """
    own = known.get(trace.model)
    if own is None or shift is None or text_id(trace) in own.text_ids:
        return None
    asked = (trace.manifest.model_revision, trace.manifest.n_draws)
    return own.divergence(shift) if asked == (own.model_revision, own.n_draws) else None


def calibrate(traces: Sequence[Trace], shifts: pl.DataFrame, measured: pl.DataFrame) -> Calibration:
    """Fit a line through the logarithms of shift and divergence of all rows on some traces.

    Parameters
    ----------
    traces : sequence of Trace
        Of one model, with as many draws of sensitivities each.
    shifts : polars.DataFrame
        Rows of a replay of these traces.
    measured : polars.DataFrame
        Rows of a masked or forced validation of the same texts, cells joined by the names of traces: their
        ids differ between machines.

    Raises
    ------
    UserError
        If traces are of several models, without sensitivities or of one name, if a cell is twice in a table,
        if fewer than three cells are in both, or if no rising line goes through them.
    """
    kinds = {(own.model, own.manifest.model_revision, own.manifest.n_draws) for own in traces}
    if len(kinds) != 1:
        found = ", ".join(f"'{model}' {revision} with {n} draws" for model, revision, n in sorted(kinds))
        raise UserError(
            f"--trace has traces of {found or 'nothing'}; allowed: one model, and as many draws of each"
        )
    ((model, revision, n_draws),) = kinds
    if not n_draws:
        raise UserError("--trace has traces without sensitivities; allowed: those that --shifts is of")
    texts = {own.path.name: own for own in traces}
    if len(texts) < len(traces):
        raise UserError(
            "--trace has two traces of one name; allowed: names of their own, by which cells are joined"
        )
    ids = [own.trace_id for own in traces]
    told = _cells("--shifts", shifts.filter(pl.col("trace_id").is_in(ids)), model, "shift_mean")
    truth = _cells("--measured", measured, model, "kl_mean")
    both = told.join(truth, on=_CELL)
    if len(both) < 3 or both["shift_mean"].n_unique() < 2:
        raise UserError(
            f"{len(both)} cells of --trace are both in --shifts and in --measured; allowed: at least 3, of "
            "the same policies, budgets and traces, not all of one shift"
        )
    shift, divergence = (both[name].to_numpy() for name in ("shift_mean", "kl_mean"))
    slope, intercept, spread = line(shift, divergence)
    if slope <= 0:
        raise UserError(
            f"--measured falls where --shifts rises (slope {slope:.2f}) for {model}; allowed: it rises"
        )
    return Calibration(
        model=model,
        model_revision=revision,
        n_draws=n_draws,
        slope=slope,
        intercept=intercept,
        spread=spread,
        least=float(shift.min()),
        most=float(shift.max()),
        policies=tuple(both["policy"].unique().sort().to_list()),
        text_ids=tuple(sorted(text_id(texts[name]) for name in both["trace"].unique())),
        n_rows=len(both),
    )


def _cells(option: str, rows: pl.DataFrame, model: str, number: str) -> pl.DataFrame:
    """Keep what was replayed of a model where the number is above 0: columns of ``_CELL``, and the number."""
    if not rows[number].dtype.is_numeric():
        raise UserError(f"{option}: {number} is {rows[number].dtype}; allowed: numbers")
    own = rows.filter(pl.col("status") == "ok", pl.col(number).is_finite(), pl.col(number) > 0, model=model)
    own = own.select(*_CELL, number)
    if own.select(_CELL).is_duplicated().any():
        raise UserError(f"{option} has a policy at a budget on a trace twice; allowed: once")
    return own


def line(shift: np.ndarray, divergence: np.ndarray) -> tuple[float, float, float]:
    """Fit a line through the logarithms, (n,) each, and move it so that the means agree.

    Returns
    -------
    slope, intercept, spread : float
        As of `Calibration`.
    """
    slope, intercept = np.polyfit(np.log(shift), np.log(divergence), 1)
    spread = (np.log(divergence) - slope * np.log(shift) - intercept).std()
    return float(slope), float(np.log(divergence.sum() / (shift**slope).sum())), float(spread)
