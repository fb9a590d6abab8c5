"""Causal attention and its log-sum-exp against a slow twin; the tap into a model's attention."""

import math

import pytest
import torch
from tiny_models import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import validate.models.causal
from traces.errors import UserError
from validate.models.attention_hook import (
    IMPLEMENTATION,
    RECORDER_ATTRIBUTE,
    attention_layers,
    probe_attention,
    recording,
)
from validate.models.causal import blocked_attention, causal_attention, flash_attention
from validate.record.recorder import observed_shape

LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 3e-4}
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def naive_attention(queries, keys, values, scale):
    """Attend one query at a time in float64, with lists."""
    n_query_heads, n_tokens, _ = queries.shape
    n_kv_heads, n_entries, _ = keys.shape
    outputs, sums = torch.empty(queries.shape, dtype=torch.float64), torch.empty(n_query_heads, n_tokens)
    for head in range(n_query_heads):
        kv_head = head // (n_query_heads // n_kv_heads)
        for i in range(n_tokens):
            seen = range(n_entries - n_tokens + i + 1)
            query = queries[head, i].double()
            logits = [float(scale * query @ keys[kv_head, j].double()) for j in seen]
            top = max(logits)
            lse = top + math.log(sum(math.exp(logit - top) for logit in logits))
            sums[head, i] = lse
            outputs[head, i] = sum(
                math.exp(logit - lse) * values[kv_head, j].double()
                for j, logit in zip(seen, logits, strict=True)
            )
    return outputs, sums


def random_heads(n_query_heads, n_kv_heads, n_tokens, n_entries, dtype):
    generator = torch.Generator().manual_seed(n_tokens + n_entries)

    def draw(n, heads):
        # Transposed views, as models hand them over.
        return torch.randn(n, heads, 8, generator=generator).to(dtype).transpose(0, 1)

    return draw(n_tokens, n_query_heads) * 3, draw(n_entries, n_kv_heads), draw(n_entries, n_kv_heads)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [flash_attention, blocked_attention, causal_attention])
@pytest.mark.parametrize("dtype", list(LSE_TOLERANCE))
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("n_tokens", "n_entries"), [(1, 1), (1, 20), (9, 9), (7, 20), (20, 21)])
def test_attention_and_lse_match_naive(attend, dtype, n_kv_heads, n_tokens, n_entries):
    queries, keys, values = random_heads(6, n_kv_heads, n_tokens, n_entries, dtype)
    output, lse = attend(queries, keys, values, 0.3)
    expected_output, expected_lse = naive_attention(queries, keys, values, 0.3)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, atol=LSE_TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(output.double(), expected_output, atol=OUTPUT_TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("block_logits", [1, 6 * 30 * 4, 6 * 30 * 13])
def test_blocks_of_queries_do_not_change_the_result(block_logits):
    heads = random_heads(6, 2, 13, 30, torch.float32)
    whole = blocked_attention(*heads, 0.3)
    parts = blocked_attention(*heads, 0.3, block_logits=block_logits)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_lse_of_large_logits_is_finite():
    queries, keys, values = random_heads(2, 1, 5, 40, torch.float32)
    for attend in (flash_attention, blocked_attention):
        output, lse = attend(queries * 1000, keys * 1000, values, 1.0)
        assert torch.isfinite(output).all()
        assert torch.isfinite(lse).all()


def test_without_the_private_kernel_attention_falls_back(monkeypatch):
    heads = random_heads(4, 2, 6, 11, torch.float32)
    expected = causal_attention(*heads, 0.5)
    monkeypatch.setattr(validate.models.causal, "has_cpu_flash", lambda: False)
    monkeypatch.setattr(validate.models.causal, "flash_attention", None)
    for found, wanted in zip(causal_attention(*heads, 0.5), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def unseen(call):
    """Look at no call."""


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recording_restores_the_model(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    model.train()
    model.lm_head.eval()
    calls = []
    with recording(model, calls.append):
        assert model.config._attn_implementation == IMPLEMENTATION
        assert not model.training
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert [call.layer for call in calls] == [0, 1]
    assert model.config._attn_implementation == implementation
    assert model.training
    assert not model.lm_head.training
    assert not any(hasattr(module, RECORDER_ATTRIBUTE) for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_recording_restores_the_model_after_an_error(error):
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(error), recording(model, unseen):
        raise error
    assert model.config._attn_implementation == before
    assert not any(hasattr(module, RECORDER_ATTRIBUTE) for module in model.modules())


def test_recording_twice_at_once_is_refused():
    model = tiny_model()
    with recording(model, unseen):
        with pytest.raises(UserError, match="kvbudget_record already"), recording(model, unseen):
            pass
        assert model.config._attn_implementation == IMPLEMENTATION


def test_probe_sees_each_layer_with_its_scale_and_window():
    calls = probe_attention(tiny_model("mistral", sliding_window=50))
    assert [call.layer for call in calls] == [0, 1]
    assert {call.scale for call in calls} == {8**-0.5}
    assert {call.window for call in calls} == {50}


def test_scale_comes_from_the_model():
    model = tiny_model("granite", attention_multiplier=0.125)
    assert {call.scale for call in probe_attention(model)} == {0.125}


REFUSED = {
    "soft-capped": ("gemma2", {}),
    "attention sinks": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "linear_attention": ("qwen3_next", {"num_experts": 2, "num_experts_per_tok": 1}),
    "chunked_attention": ("llama4_text", {"num_local_experts": 2}),
    "not causal": ("bert", {}),
    "0 of its 2 layers": ("bloom", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", list(REFUSED))
def test_attention_that_is_more_than_causal_softmax_is_refused(words):
    kind, settings = REFUSED[words]
    model = tiny_model(kind, **settings)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=words):
        probe_attention(model)
    assert model.config._attn_implementation == before


def test_sliding_window_in_force_is_refused():
    model = tiny_model("mistral", sliding_window=5)
    ids = torch.arange(3, 9)[None]
    words = "sliding window of 5 entries, in force at 6 tokens"
    with pytest.raises(UserError, match=words), recording(model, unseen):
        model(input_ids=ids, use_cache=False)
    with recording(model, unseen):
        model(input_ids=ids[:, :5], use_cache=False)


def test_batches_masks_and_values_of_another_width_are_refused():
    model = tiny_model()
    layer = attention_layers(model)[0]
    heads = torch.zeros(1, 4, 3, 8)
    record_attention = validate.models.attention_hook.record_attention
    with pytest.raises(UserError, match="batch of 2"):
        record_attention(layer, *[heads.expand(2, -1, -1, -1)] * 3, None)
    with pytest.raises(UserError, match="mask of its own"):
        record_attention(layer, heads, heads, heads, torch.zeros(1, 1, 3, 3))
    with pytest.raises(UserError, match="not grouped heads of one width"):
        record_attention(layer, heads, heads, heads[..., :4], None)
    with pytest.raises(UserError, match="dropout"):
        record_attention(layer, heads, heads, heads, None, dropout=0.1)


@pytest.mark.parametrize(
    ("configuration", "model", "sizes"),
    [
        (GPT2Config, GPT2LMHeadModel, {"n_layer": 2, "n_head": 4, "n_embd": 32}),
        (
            GPTNeoXConfig,
            GPTNeoXForCausalLM,
            {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64},
        ),
    ],
)
def test_a_field_that_attention_does_not_read_is_named(configuration, model, sizes):
    config = configuration(**sizes, vocab_size=50, bos_token_id=0, eos_token_id=0)
    assert observed_shape(model(config).eval())[0].n_kv_heads == 4
    config.num_key_value_heads = 2
    words = "num_key_value_heads of the configuration is 2, and attention has .* each of its 4 query heads"
    with pytest.raises(UserError, match=words):
        observed_shape(model(config).eval())
