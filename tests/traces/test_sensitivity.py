"""Traces that hold sensitivities: written, read, checked, and refused in words."""

from __future__ import annotations

import json

import naive_traces as naive
import numpy as np
import pytest

from traces import ModelShape, TraceError, TraceWriter, check_trace, open_trace
from traces.manifest import sensitivity_dtype
from traces.numbers import round_to_storage, to_float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_they_come_back_as_they_were_rounded(tmp_path, rng, dtype):
    drawn = rng.standard_normal((2, 3, 4, 17, 8), dtype=np.float32) * 1e6
    weights = rng.standard_normal((3, 17))
    trace = naive.small_trace(
        tmp_path / "t.kvtrace", dtype=dtype, sensitivity=drawn, draw_log_weights=weights
    )
    stored = "float32" if dtype == "float32" else "bfloat16"
    assert sensitivity_dtype(dtype) == stored
    for layer in range(2):
        expected = to_float32(round_to_storage(drawn[layer], stored), stored)
        np.testing.assert_array_equal(trace.sensitivity(layer), expected)
        np.testing.assert_array_equal(trace.sensitivity(layer, 4, 9), expected[:, :, 4:9])
    np.testing.assert_array_equal(trace.draw_log_weights, weights.astype(np.float32))
    plain = naive.small_trace(tmp_path / "plain.kvtrace", dtype=dtype)
    assert trace.trace_id == plain.trace_id
    assert any("sensitivities are finite" in told for told in check_trace(trace))
    with pytest.raises(ValueError, match="steps 4 to 18 asked; allowed: a span of 0 to 17"):
        trace.sensitivity(0, 4, 18)
    with pytest.raises(ValueError, match="layer is 2; allowed: 0 to 1"):
        trace.stored_sensitivity(2)


@pytest.fixture
def path(tmp_path):
    return naive.small_trace(tmp_path / "t.kvtrace", dtype="bfloat16", n_draws=2).path


def test_a_damaged_number_is_found(path):
    place = path / "sensitivity_001.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(TraceError, match=r"sensitivity_001\.safetensors: sha256 .* found; the manifest says"):
        check_trace(open_trace(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["files"].pop("draws.safetensors"), "sensitivity.files lacks 'draws.safetensors'"),
        (lambda own: own["files"].pop("sensitivity_001.safetensors"), "lacks 'sensitivity_001.safetensors'"),
        (lambda own: own["files"].update(x=own["files"]["draws.safetensors"]), "sensitivity.files lists 'x'"),
        (lambda own: own.update(n_draws=3), "the manifest says F32 (3, 17)"),
        (lambda own: own.update(n_draws=0), "n_draws"),
        (lambda own: own.pop("n_draws"), "n_draws"),
    ],
)
def test_a_record_that_cannot_be_is_refused(path, change, message):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["sensitivity"])
    (path / "manifest.json").write_text(json.dumps(naive.signed(manifest)))
    with pytest.raises(TraceError) as error:
        open_trace(path)
    assert message in str(error.value)


def test_a_missing_file_is_named(path):
    (path / "draws.safetensors").unlink()
    with pytest.raises(TraceError, match=r"draws\.safetensors: missing; the manifest names it"):
        open_trace(path)


SHAPE = ModelShape(2, 4, 2, 8, "bfloat16")


@pytest.fixture
def writer(tmp_path, rng):
    """A writer with the tokens of both layers."""
    with TraceWriter(tmp_path / "t.kvtrace", SHAPE) as opened:
        for layer in range(2):
            opened.append(
                layer,
                np.zeros((4, 6, 8), np.float32),
                np.zeros((2, 6, 8), np.float32),
                np.log(np.tile(np.arange(1, 7, dtype=np.float32), (4, 1))),
            )
        yield opened


def finish(writer):
    return writer.finish(np.arange(6), prompt_tokens=2, model="m", origin="synthetic")


def test_layers_and_weights_have_to_fit(writer, tmp_path):
    writer.write_sensitivity(0, np.ones((3, 4, 4, 8), np.float32))
    with pytest.raises(ValueError, match=r"by layer, and log_weights \(\); allowed: one n_draws and 4 steps"):
        finish(writer)
    writer.write_draws(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="one n_draws and 4 steps in all"):
        finish(writer)
    writer.write_sensitivity(1, np.ones((3, 4, 4, 8), np.float32))
    assert finish(writer).sensitivity(1).shape == (3, 4, 4, 8)
    assert sorted(own.name for own in tmp_path.iterdir()) == ["t.kvtrace"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 2, 4, 8), np.float32), r"has shape \(3, 2, 4, 8\); allowed: \(n_draws, 4, n_steps, 8\)"),
        (np.ones((4, 4, 8), np.float32), r"has shape \(4, 4, 8\)"),
        (np.ones((0, 4, 4, 8), np.float32), r"has shape \(0, 4, 4, 8\)"),
        (np.ones((3, 4, 4, 8), np.int32), "int32 found"),
        (np.full((3, 4, 4, 8), np.nan, np.float32), "NaN or infinity"),
        (np.full((3, 4, 4, 8), 3.4e38, np.float32), "NaN or infinity"),
    ],
)
def test_what_is_no_sensitivity_is_refused(writer, array, message):
    with pytest.raises(ValueError, match=message):
        writer.write_sensitivity(0, array)
    with pytest.raises(ValueError, match="layer is 2; allowed: 0 to 1, once each"):
        writer.write_sensitivity(2, array)
    for wrong in (np.zeros(3), np.zeros((3, 4), np.int64), np.full((3, 4), np.inf)):
        with pytest.raises(ValueError, match="allowed: finite floats"):
            writer.write_draws(wrong)
    assert not finish(writer).has_sensitivity
