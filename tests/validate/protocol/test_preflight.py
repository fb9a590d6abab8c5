"""What a protocol is refused for before anything is decoded, and what is set beside published numbers."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from spies import NAME

from simulator.policies.wave import known_waves
from traces.errors import MissingDataError
from validate.protocol.file import read_protocol
from validate.protocol.options import Asked, choose_model
from validate.protocol.preflight import require_runnable
from validate.protocol.published import beside_published


def test_a_wave_of_another_shape_is_refused_beforehand(config, saved, tmp_path):
    protocol, asked = read_protocol(config()), Asked(config(), tmp_path)
    model = choose_model(protocol, None)
    waves = known_waves([saved / "wave.json"])
    require_runnable(protocol, model, asked, waves)
    wave = waves[NAME]
    longer = replace(wave, demand=(*wave.demand, 2.0), head_demand=(*wave.head_demand, (1.0, 1.0)))
    with pytest.raises(MissingDataError, match=r"policy 'reasonalloc' at budget 20: .* has 3 layers"):
        require_runnable(protocol, model, asked, waves | {NAME: longer})
    other = replace(wave, model_revision="other")
    with pytest.raises(MissingDataError, match="is of revision other"):
        require_runnable(protocol, model, asked, waves | {NAME: other})


def test_a_share_of_the_texts_is_compared_with_a_share():
    rows = pl.DataFrame(
        {"problem": ["a", "a"], "family": ["x", "y"], "sample": [0, 1], "policy": ["rkv"] * 2}
        | {"policy_params": ["{}"] * 2, "budget_asked": [5.0] * 2, "budget_unit": ["entries"] * 2}
        | {"budget_kind": ["kept"] * 2}
        | {"right": [True, False], "answer": ["1", None], "ended": [True] * 2, "loop_period": [None] * 2}
        | {"n_tokens": [3] * 2, "diverged_at": [None] * 2, "bytes_peak": [1] * 2, "bytes_mean": [1.0] * 2}
    )
    (row,) = beside_published(rows, "m", "b", []).to_dicts()
    assert (row["accuracy"], row["n_problems"], row["n_samples"], row["difference"]) == (0.5, 1, 2, None)
