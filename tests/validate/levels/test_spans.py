"""A forced run by spans decides as one token by token, whatever the policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import make_wave
from tiers import sampled
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from validate.levels.runs import _ForcedLayer, _TraceRun, baseline_of
from validate.record.decode import record_decode

# Every kind of decision: spans and windows, draws, values, running sums; layers divided beforehand and anew;
# heads alike, by share and by table; triggers by room, by count, at every token, and at tokens of the text.
# Not knorm: in the first layer a key's norm is its token's wherever that stands, and rounding settles ties.
POLICIES = [
    "streamingllm",
    "random",
    "random-prompt",
    "h2o",
    "tova",
    "keydiff",
    "vatp:sinks=4",
    "lagkv:lag=8",
    "snapkv",
    "snapkv-paper:window=8",
    "criticalkv:window=8",
    "append-only",
    "expected-attention",
    "rkv",
    "rkv-code",
    "rkv+adakv",
    "rkv+headkv",
    "rkv+duo",
    "rkv+pyramid",
    "rkv+wave",
    "rkv+wave-dynamic",
    "rkv+squeeze",
    "rkv+cake:cake_window=8",
    "rkv+wave-dynamic:layer_delta=12",
    "rkv+utility:delta=12",
    "reasonalloc:delta=12",
    "cakekv:window=8,cake_window=8",
    "rkv:trigger=every-n,interval=11,offset=3",
    "h2o:trigger=per-step",
    "rkv:trigger=segment",
]
PROMPT = torch.randint(3, N_TOKEN_IDS, (20,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("spans") / "own.kvtrace"
    return record_decode(
        model, None, PROMPT, path, max_new_tokens=80, stop_ids=(), model_name="tiny", with_values=True
    )


@pytest.fixture(scope="module")
def baseline(model, trace):
    return baseline_of(model, trace)


@pytest.mark.slow
@pytest.mark.parametrize("text", sampled(POLICIES, 12))
def test_decisions_and_predictions_are_those_of_single_tokens(text, model, trace, baseline, monkeypatch):
    ends = "/".join(map(str, np.unique(trace.token_ids[trace.prompt_tokens :: 5])))
    text = text.replace("=segment", f"=segment,segment={ends}")
    policy = parse_policy(text, buffer=None if "trigger" in text else 6)
    run = _TraceRun(model, trace, policy, 24, 3, {trace.model: make_wave(trace, (3, 1))})
    fed = []
    whole = model.forward

    def forward(*arguments, **named):
        fed.append(named["input_ids"].shape[1])
        return whole(*arguments, **named)

    monkeypatch.setattr(model, "forward", forward)
    (one, expected), (many, found) = (
        run.feed(_ForcedLayer, most, baseline.predictions.compare) for most in (1, 512)
    )
    n_steps = trace.total_tokens - trace.prompt_tokens
    n_passes = len(fed) - 1 - (n_steps + 1)  # of the second run, after its prompt
    assert n_passes == 1 or (policy.divides_layers_again and n_passes < n_steps / 2)
    for mine, theirs in zip(many, one, strict=True):
        assert [(k.kv_head, k.compression, k.n_tokens, k.positions.tolist()) for k in mine.retained] == [
            (k.kv_head, k.compression, k.n_tokens, k.positions.tolist()) for k in theirs.retained
        ]
        assert len(mine.retained) > 4
        for name in ("mass", "lost"):
            together, alone = (np.concatenate(getattr(own, name), 1) for own in (mine, theirs))
            assert together.shape == alone.shape == (4, n_steps)
            np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.kl, expected.kl, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found.agrees, expected.agrees)
