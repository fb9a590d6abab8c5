"""RoPE parameters of a manifest are read as transformers does, or refused in words."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from simulator.policies.rope import read_rope
from traces.errors import MissingDataError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        LLAMA3,
    ],
)
def test_frequencies_are_those_of_transformers(parameters):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters=parameters, max_position_embeddings=8192
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(read_rope(parameters, 128).frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "missing"),
        ({"rope_theta": -1}, "allowed: a rope_theta of 1 to"),
        ({"rope_theta": 1e-300}, "allowed: a rope_theta of 1 to"),
        ({"rope_theta": 1e308}, "allowed: a rope_theta of 1 to"),
        (LLAMA3 | {"low_freq_factor": LLAMA3["high_freq_factor"]}, "is not below its high_freq_factor"),
        ({"rope_theta": 1e4, "rope_type": "yarn"}, "rope_type is 'yarn'; allowed: default, linear, llama3"),
        ({"rope_theta": 1e4, "rope_type": "linear"}, "'linear' lacks or misstates 'factor'"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": 0}, "finite frequencies above 0"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": "much"}, "lacks or misstates"),
        ({"rope_theta": 1e4, "partial_rotary_factor": None}, "lacks or misstates"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 3}, "turn 12 pairs of a head's 8 channels"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0}, "turn 0 pairs"),
        (LLAMA3 | {"factor": 0}, "finite frequencies above 0"),
        ({key: value for key, value in LLAMA3.items() if key != "factor"}, "'factor'"),
    ],
)
def test_what_is_no_rope_is_refused(parameters, words):
    with pytest.raises(MissingDataError, match=words):
        read_rope(parameters, 8)
