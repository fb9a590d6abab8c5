"""From a simulated metric to expected accuracy: a monotone curve measured under real eviction."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from traces.atomic import write_file
from traces.documents import read_json
from traces.errors import UserError


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected accuracy of one model on one family of problems, as a function of a metric.

    Attributes
    ----------
    model, family : str
    metric : str
        Column of a replay's rows.
    values : tuple of float
        Increasing values of the metric.
    accuracy : tuple of float
        Share of right answers at each; monotone. Between them it is linear, beyond them constant.
    error : float
        Nine of ten cells of a policy that the curve was not fitted on lie within so much of it.
    n_cells, n_problems : int
        What it was fitted on.
    """

    model: str
    family: str
    metric: str
    values: tuple[float, ...]
    accuracy: tuple[float, ...]
    error: float
    n_cells: int
    n_problems: int

    def predict(self, value: float) -> tuple[float, float, float]:
        """Give the expected accuracy at a value of the metric, and its interval."""
        expected = float(np.interp(value, self.values, self.accuracy))
        return expected, max(0.0, expected - self.error), min(1.0, expected + self.error)


def write_calibrations(calibrations: list[Calibration], path: Path) -> None:
    """Write curves as JSON."""
    text = json.dumps([asdict(each) for each in calibrations], indent=1) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_calibrations(path: Path) -> list[Calibration]:
    """Read curves back.

    Raises
    ------
    UserError
        If the file is no list of curves.
    """
    found: list[Calibration] = read_json(path, f"calibration {path}", list[Calibration])
    for curve in found:
        n_values = len(curve.values)
        rises = all(low < high for low, high in pairwise(curve.values))
        if not n_values or len(curve.accuracy) != n_values or not rises:
            raise UserError(
                f"calibration {path}: the curve of {curve.model}, {curve.family} has {n_values} values and "
                f"{len(curve.accuracy)} accuracies; allowed: as many of both, values rising"
            )
    return found
