"""What a shift is in nats of divergence: the line, where it speaks, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from naive_traces import small_trace

from simulator.cells import run_replay
from simulator.results.calibration import (
    Calibration,
    calibrate,
    predicted_divergence,
    read_calibration,
    text_id,
)
from traces.errors import MissingDataError, UserError

POLICIES = ["recency:buffer=4", "snapkv:buffer=4,window=4", "h2o:buffer=4"]


@pytest.fixture
def traces(tmp_path):
    return [
        small_trace(tmp_path / f"{i}.kvtrace", seed=i, n_tokens=50 + i, n_draws=2, dtype="float32")
        for i in range(4)
    ]


@pytest.fixture
def shifts(traces):
    return run_replay(traces[:3], POLICIES, [14, 24]).table


def measured(shifts, slope=1.5, factor=0.25, noise=0.0):
    """Give rows whose divergence follows from the shifts, under ids of another machine."""
    rng = np.random.default_rng(0)
    ratio = pl.Series(factor * np.exp(noise * rng.standard_normal(len(shifts))))
    return shifts.with_columns(
        kl_mean=ratio * pl.col("shift_mean") ** slope, trace_id=pl.lit("another"), shift_mean=None
    )


def test_the_line_that_rows_were_made_from_is_found(traces, shifts):
    found = calibrate(traces, shifts, measured(shifts))
    assert (found.slope, math.exp(found.intercept)) == pytest.approx((1.5, 0.25))
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert (found.least, found.most) == (shifts["shift_mean"].min(), shifts["shift_mean"].max())
    assert found.policies == ("h2o", "recency", "snapkv")
    assert found.text_ids == tuple(sorted(text_id(own) for own in traces[:3]))
    assert (found.model, found.n_draws, found.n_rows) == (traces[0].model, 2, 18)


def test_under_noise_means_agree(traces, shifts):
    truth = measured(shifts, noise=0.4)
    found = calibrate(traces, shifts, truth)
    predicted = [found.divergence(own) for own in shifts["shift_mean"]]
    assert np.mean(predicted) == pytest.approx(truth["kl_mean"].mean())
    logs = np.log(truth["kl_mean"].to_numpy()), np.log(shifts["shift_mean"].to_numpy())
    assert found.slope == pytest.approx(np.cov(*logs)[0, 1] / np.var(logs[1], ddof=1))
    assert 0.2 < found.spread < 0.6


def test_it_is_written_read_and_refused_if_changed(traces, shifts, tmp_path):
    found, path = calibrate(traces, shifts, measured(shifts)), tmp_path / "mine.json"
    found.write(path)
    assert read_calibration(path) == found
    stored = json.loads(path.read_text())
    for change, told in (
        ({"slope": 2.0}, "was changed since it was written"),
        ({"version": 7}, "format 'kvbudget-calibration' 7 found; allowed: 'kvbudget-calibration' 1"),
    ):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(MissingDataError, match=told):
            read_calibration(path)


def test_a_replay_predicts_other_traces_within_what_was_measured(traces, shifts, tmp_path):
    path = tmp_path / "mine.json"
    calibrate(traces, shifts, measured(shifts)).write(path)
    asked = traces, [*POLICIES, "fullkv"], [14, 24]
    table = run_replay(*asked, calibrations=[path]).table
    assert run_replay(*asked).table["predicted_kl"].null_count() == len(table)
    own = table.filter(trace="3.kvtrace")
    least, most = shifts["shift_mean"].min(), shifts["shift_mean"].max()
    for row in own.iter_rows(named=True):
        if row["policy"] == "fullkv":
            assert row["predicted_kl"] == 0
        elif least <= row["shift_mean"] <= most:
            assert row["predicted_kl"] == pytest.approx(0.25 * row["shift_mean"] ** 1.5)
        else:
            assert row["predicted_kl"] is None
    assert own["predicted_kl"].count() > 2
    assert table.filter(pl.col("trace") != "3.kvtrace")["predicted_kl"].null_count() == 3 * 8


def test_nothing_is_predicted_of_what_was_not_measured(traces, shifts):
    found = calibrate(traces[:3], shifts, measured(shifts))
    trace, shift = traces[3], (found.least * found.most) ** 0.5

    def told(own: Calibration, shift: float | None = shift) -> float | None:
        return predicted_divergence(trace, shift, {own.model: own})

    assert told(found) == pytest.approx(0.25 * shift**1.5)
    assert told(found, None) is None
    assert told(found, 0.0) == 0
    for other in (
        replace(found, model="another"),
        replace(found, model_revision="another"),
        replace(found, n_draws=3),
        replace(found, text_ids=(text_id(trace),)),
        replace(found, least=shift * 1.01),
        replace(found, most=shift * 0.99),
    ):
        assert told(other) is None


def test_a_calibration_of_another_model_is_told(traces, shifts, tmp_path, run_sim):
    path = tmp_path / "other.json"
    replace(calibrate(traces, shifts, measured(shifts)), model="another").write(path)
    asked = ["replay", "-t", traces[0].path, "-p", "recency", "-b", 14, "--buffer", 4, "--calibration", path]
    code, _, err = run_sim(*asked)
    assert code == 0
    assert f"calibration {path} is of model 'another' and changes nothing for {traces[0].model}" in err


def test_a_mean_is_predicted_only_of_all_traces(traces, shifts, tmp_path, run_sim):
    path = tmp_path / "mine.json"
    replace(calibrate(traces, shifts, measured(shifts)), text_ids=(text_id(traces[0]),)).write(path)
    common = ["replay", "-p", "recency", "-b", 14, "--buffer", 4, "--calibration", path]
    of_all, of_some = ([part for own in some for part in ("-t", own.path)] for some in (traces[1:3], traces))
    code, out, _ = run_sim(*common, *of_all)
    assert code == 0
    assert "predicted" in out
    assert "KL" in out
    assert "no divergence is predicted" not in out
    code, out, _ = run_sim(*common, *of_some)
    assert "For 1 of 4 cells no divergence is predicted" in out
    assert "KL" not in out


def test_rows_that_do_not_fit_are_refused(traces, shifts, tmp_path):
    truth = measured(shifts)
    with pytest.raises(UserError, match="2 cells of --trace are both in"):
        calibrate(traces, shifts, truth.head(2))
    with pytest.raises(UserError, match="--measured falls where --shifts rises"):
        calibrate(traces, shifts, measured(shifts, slope=-1.0))
    other = small_trace(tmp_path / "other.kvtrace", n_draws=3, dtype="float32")
    with pytest.raises(UserError, match="0 cells of --trace are both in"):
        calibrate(traces, shifts, truth.with_columns(model=pl.lit("another")))
    with pytest.raises(UserError, match="--measured has a policy at a budget on a trace twice"):
        calibrate(traces, shifts, pl.concat([truth, truth.head(1)]))
    with pytest.raises(UserError, match="kl_mean is String; allowed: numbers"):
        calibrate(traces, shifts, truth.with_columns(pl.col("kl_mean").cast(pl.String)))
    with pytest.raises(UserError, match="traces without sensitivities"):
        calibrate([small_trace(tmp_path / "plain.kvtrace")], shifts, truth)
    with pytest.raises(UserError, match="two traces of one name"):
        calibrate([*traces, traces[0]], shifts, truth)
    with pytest.raises(UserError, match=r"with 2 draws.*with 3 draws; allowed: one model"):
        calibrate([*traces, other], shifts, truth)


def test_the_command_fits_rows_of_two_files(traces, shifts, tmp_path, run_sim):
    shifts.write_parquet(tmp_path / "shifts.parquet")
    measured(shifts).write_parquet(tmp_path / "measured.parquet")
    asked = [
        "validate",
        "calibrate",
        "--shifts",
        tmp_path / "shifts.parquet",
        "--out",
        tmp_path / "mine.json",
    ]
    asked += [part for own in traces for part in ("--trace", own.path)]
    code, out, err = run_sim(*asked, "--measured", tmp_path / "measured.parquet", "-p", "recency,h2o")
    assert code == 0, err
    assert "12 cells of 2 policies on 3 texts" in out
    assert "divergence = 0.250 x shift^1.500" in out
    assert read_calibration(tmp_path / "mine.json").policies == ("h2o", "recency")
    code, _, err = run_sim(*asked, "--measured", tmp_path / "shifts.parquet")
    assert (code, "--measured has no kl_mean" in err) == (2, True)
    code, _, err = run_sim(*asked, "--measured", tmp_path / "measured.parquet", "-p", "tova")
    assert (code, "--policy has 'tova', which no row of --shifts is of" in err) == (2, True)
