"""Sensitivities: the gradients of drawn log-probabilities, and what they say of small errors."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
from recording import PROMPT, decode
from tiny_models import tiny_model
from transformers import AttentionInterface

from traces.check import check_trace
from traces.errors import MissingDataError
from traces.store import open_trace
from validate.models.attention_hook import replaced_attention
from validate.problems.families import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.sensitivity import sensitivities

IDS = [*PROMPT, 12, 40, 7, 3, 22, 60, 9, 15, 33]
N_PROMPT, N_STEPS = len(PROMPT), len(IDS) - len(PROMPT)


def moved_logits(model, errors, ids=IDS):
    """Give float64 logits of the decode steps where every head's output is off by an error.

    ``errors`` are by layer (n_query_heads, n_steps, head_dim), and may ask for a gradient.
    """

    def attend(module, query, key, value, mask, dropout=0.0, scaling=None, **_):
        n_each = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(n_each, 1).transpose(2, 3) * scaling
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        output = weights @ value.repeat_interleave(n_each, 1)
        error = torch.cat([torch.zeros_like(output[0, :, :N_PROMPT]), errors[module.layer_idx]], 1)
        return (output + error).transpose(1, 2).contiguous(), None

    AttentionInterface.register("moved", attend)
    with replaced_attention(model, "moved", "_moved", True):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, N_PROMPT:].double()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_they_are_the_gradients_of_what_was_drawn(kind, monkeypatch):
    model = tiny_model(kind)
    drawn, multinomial = [], torch.multinomial

    def draw(*given, **options):
        drawn.append(multinomial(*given, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", draw)
    found, log_weights = sensitivities(model, IDS, N_PROMPT, n_draws=3, seed=5)
    width = model.config.head_dim
    errors = [torch.zeros(4, N_STEPS, width, requires_grad=True) for _ in range(2)]
    logs = moved_logits(model, errors).log_softmax(-1)
    likely, tokens = logs.topk(16)
    for number in range(3):
        chosen = drawn[0][:, number : number + 1]
        expected = torch.autograd.grad(
            logs.gather(1, tokens.gather(1, chosen)).sum(), errors, retain_graph=True
        )
        for layer in range(2):
            np.testing.assert_allclose(found[layer][number], expected[layer], atol=1e-5)
        told = likely - (0.25 * likely).log_softmax(-1)
        np.testing.assert_allclose(log_weights[number], told.gather(1, chosen)[:, 0].detach(), atol=1e-5)


def test_small_errors_move_predictions_as_they_say():
    model = tiny_model(vocab_size=16)
    ids = [token % 16 for token in IDS]
    found, log_weights = sensitivities(model, ids, N_PROMPT, n_draws=4000)
    generator = torch.Generator().manual_seed(1)
    errors = [0.003 * torch.randn(own.shape[1:], generator=generator) for own in found]
    with torch.no_grad():
        full = moved_logits(model, [torch.zeros_like(own) for own in errors], ids).log_softmax(-1)
        moved = moved_logits(model, errors, ids).log_softmax(-1)
    divergence = float((full.exp() * (full - moved)).sum())
    z = sum(torch.einsum("khtd,htd->k", own, error) for own, error in zip(found, errors, strict=True))
    # Steps are drawn independently: a draw of all of them weighs as the product.
    weights = log_weights.double().sum(1).exp()
    estimate = float((weights * z.double() ** 2).mean()) / 2
    assert divergence > 0
    assert estimate == pytest.approx(divergence, rel=0.3)


def test_a_recording_holds_them(tmp_path):
    model = tiny_model()
    plain = decode(model, tmp_path / "plain.kvtrace", with_values=True)
    trace = decode(model, tmp_path / "t.kvtrace", with_values=True, n_draws=2)
    assert trace.trace_id == plain.trace_id
    assert not plain.has_sensitivity
    assert "sensitivities are finite" in " ".join(check_trace(trace))
    found, log_weights = sensitivities(model, trace.token_ids.tolist(), len(PROMPT), n_draws=2)
    np.testing.assert_array_equal(trace.draw_log_weights, log_weights)
    for layer, own in enumerate(found):
        np.testing.assert_array_equal(trace.sensitivity(layer), own)
        np.testing.assert_array_equal(trace.sensitivity(layer, 3, 9), own[:, :, 3:9])
    with pytest.raises(MissingDataError, match="holds no sensitivities; needed: one recorded with"):
        plain.sensitivity(0)


def test_the_verb_records_them_and_a_replay_tells_the_shift(tmp_path, run_sim):
    saved, out, rows = tmp_path / "model", tmp_path / "out", tmp_path / "rows.parquet"
    tiny_model(vocab_size=VOCABULARY_SIZE).save_pretrained(saved)
    build_tokenizer().save_pretrained(saved)
    problem = make_problem("walk", 1, 0, size=4, length=60)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": problem.prompt, "completion": problem.completion}) + "\n")
    asked = ["--model", saved, "--prompts", prompts, "--rescore", "--out", out, "--quiet"]
    assert run_sim("record", *asked, "--sensitivity", 0)[0] == 2
    assert run_sim("record", *asked, "--sensitivity", 2)[0] == 0
    (path,) = out.glob("*.kvtrace")
    trace = open_trace(path)
    assert trace.has_values
    assert trace.sensitivity(0).shape[:2] == (2, 4)
    assert run_sim("record", *asked, "--sensitivity", 2)[0] == 0
    code, _, error = run_sim("record", *asked, "--sensitivity", 3)
    assert (code, "its n_draws is 2, asked 3; allowed: --overwrite" in error) == (1, True)
    assert "n_draws=2" in run_sim("trace", "info", path)[1]
    cells = ["-t", out, "-p", "rkv:window=4,recency", "-b", 20, "--buffer", 8]
    code, shown, _ = run_sim("replay", *cells)
    assert code == 0
    assert "Shift is how far predictions move" in shown
    assert run_sim("replay", *cells, "-o", rows)[0] == 0
    found = pl.read_parquet(rows)["shift_mean"]
    assert (found > 0).all()
    code, shown, _ = run_sim("results", rows, "--metric", "shift_mean")
    assert code == 0
    assert f"{found.min():.4f}" in shown
    assert "on model it is unmeasured" in " ".join(shown.split())


def test_float16_models_have_them_in_bfloat16(tmp_path):
    trace = decode(tiny_model(dtype="float16"), tmp_path / "t.kvtrace", n=8, with_values=True, n_draws=1)
    assert trace.stored_sensitivity(0).dtype == np.uint16
    assert np.abs(trace.sensitivity(1)).max() > 0
