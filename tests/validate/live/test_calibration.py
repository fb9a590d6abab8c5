"""Curves from simulated numbers to accuracy: the best monotone ones, written and read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_tables import label
from naive_ranks import slow_curve, slow_isotonic, slow_quantile

from simulator.results.calibration import Calibration, read_calibrations, write_calibrations
from traces.errors import UserError
from validate.live.fidelity import METRICS, Cells, fit_calibration


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 4), st.sampled_from("abc")), min_size=1, max_size=12
    ),
    st.sampled_from(["mass_mean", "miss_rate"]),
)
def test_a_calibration_is_the_best_monotone_curve(points, metric):
    sign = 1 if METRICS[metric].more_is_better else -1
    labels = [label(policy, i) for i, (_, _, policy) in enumerate(points)]
    x, y = [sign * a / 7 for a, _, _ in points], [b / 4 for _, b, _ in points]
    cells = Cells(labels, {metric: np.array(x)[:, None]}, np.array(y)[:, None])
    curve = fit_calibration(cells, metric, model="m", family="f")
    expected = slow_isotonic(x, y)
    if sign < 0:
        expected = [(-value, height) for value, height in reversed(expected)]
    assert list(curve.values) == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert list(curve.accuracy) == pytest.approx([height for _, height in expected], abs=1e-9)
    assert list(curve.values) == sorted(set(curve.values))
    steps = np.diff(curve.accuracy) * sign
    assert (steps >= -1e-12).all()
    errors = []
    for policy in {own[2] for own in points}:
        others = [(a, b) for a, b, own in zip(x, y, points, strict=True) if own[2] != policy]
        if others:
            fitted = slow_isotonic(*zip(*others, strict=True))
            mine = [(a, b) for a, b, own in zip(x, y, points, strict=True) if own[2] == policy]
            errors += [abs(slow_curve(fitted, a) - b) for a, b in mine]
    if errors:
        assert curve.error == pytest.approx(slow_quantile(errors, 0.9), abs=1e-9)
    else:
        assert curve.error == 1
    assert (curve.model, curve.family, curve.metric) == ("m", "f", metric)
    assert (curve.n_cells, curve.n_problems) == (len(points), 1)


RISING = Calibration("m", "walk", "mass_mean", (0.5, 0.7, 0.9), (0.0, 0.4, 0.8), 0.1, 9, 128)
FALLING = Calibration("m", "walk", "miss_rate", (0.1, 0.3), (0.95, 0.05), 0.1, 9, 128)


@pytest.mark.parametrize(
    ("curve", "value", "expected"),
    [
        (RISING, 0.6, (0.2, 0.1, 0.3)),
        (RISING, 0.7, (0.4, 0.3, 0.5)),
        (RISING, 0.1, (0.0, 0.0, 0.1)),
        (RISING, 2.0, (0.8, 0.7, 0.9)),
        (FALLING, 0.2, (0.5, 0.4, 0.6)),
        (FALLING, 0.0, (0.95, 0.85, 1.0)),
        (FALLING, 0.9, (0.05, 0.0, 0.15)),
    ],
)
def test_a_prediction_is_linear_between_and_constant_beyond(curve, value, expected):
    assert curve.predict(value) == pytest.approx(expected)


def test_of_one_policy_alone_nothing_is_known_of_others():
    cells = Cells([label("rkv", 10)], {"mass_mean": np.array([[0.5]])}, np.array([[0.0, 1.0]]))
    assert fit_calibration(cells, "mass_mean", model="m", family="f").predict(0.5) == (0.5, 0.0, 1.0)


def test_calibrations_are_written_and_read_back(tmp_path):
    path = tmp_path / "curves.json"
    write_calibrations([RISING, FALLING], path)
    assert read_calibrations(path) == [RISING, FALLING]
    assert json.loads(path.read_text())[0]["error"] == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{}x", "not valid JSON"),
        ("3", "the whole is 3; allowed: array"),
        ('{"a": 1}', "allowed: array"),
        ("[1]", "[0] is 1; allowed: object"),
        ('[{"model": "m"}]', "[0]: field 'family' is missing"),
        ('[{"values": 1}]', "[0].values is 1; allowed: array"),
    ],
)
def test_a_file_that_holds_no_curves_is_refused(tmp_path, text, words):
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_calibrations(path)
    assert str(refused.value).startswith(f"calibration {path}: ")
    assert words in str(refused.value)


def test_a_file_of_curves_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read: No such file"):
        read_calibrations(tmp_path / "none.json")
