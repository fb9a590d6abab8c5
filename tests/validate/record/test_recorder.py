"""What a recorder is given and stores: the very numbers that attention used, in pieces of any size."""

import importlib

import numpy as np
import pytest
import torch
from recording import assert_close_traces, decode
from tiny_models import tiny_model

import validate.models.causal
import validate.record.decode
from traces.check import check_trace
from traces.errors import UserError
from traces.shape import ModelShape
from validate.models.attention_hook import LayerCall
from validate.record.recorder import TraceRecorder


class Taps:
    """What RoPE and the value projections returned, taken outside of the recorder."""

    def __init__(self, model, kind, monkeypatch):
        self.n_layers = model.config.num_hidden_layers
        self.rotated, self.values = [], [[] for _ in range(self.n_layers)]
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        rotate = module.apply_rotary_pos_emb

        def tapped(*arguments, **settings):
            result = rotate(*arguments, **settings)
            self.rotated.append([tensor[0].clone() for tensor in result])
            return result

        monkeypatch.setattr(module, "apply_rotary_pos_emb", tapped)
        for layer, block in enumerate(model.model.layers):
            block.self_attn.v_proj.register_forward_hook(
                lambda _, __, output, layer=layer: self.values[layer].append(output[0].clone())
            )

    def queries(self, layer):
        return torch.cat([queries for queries, _ in self.rotated[layer :: self.n_layers]], 1)

    def keys(self, layer):
        return torch.cat([keys for _, keys in self.rotated[layer :: self.n_layers]], 1)

    def stacked_values(self, layer, n_kv_heads):
        rows = torch.cat(self.values[layer])
        return rows.unflatten(1, (n_kv_heads, -1)).transpose(0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_stored_bits_are_what_attention_used(tmp_path, monkeypatch, kind, dtype):
    model = tiny_model(kind, 2, dtype=dtype)
    taps = Taps(model, kind, monkeypatch)
    trace = decode(model, tmp_path / "a.kvtrace", with_values=True, chunk=4)
    assert trace.shape.dtype == dtype
    # The probe of one token came first, through the same taps.
    for layer in range(2):
        for name, tapped in (
            ("queries", taps.queries(layer)),
            ("keys", taps.keys(layer)),
            ("values", taps.stacked_values(layer, 2)),
        ):
            bits = tapped[:, 1:].contiguous().view(torch.uint8).numpy()
            stored = np.ascontiguousarray(trace.stored(layer, name)).view(np.uint8)
            np.testing.assert_array_equal(stored, bits)


def test_blocked_attention_records_the_same_trace(tmp_path, monkeypatch):
    fused = decode(tiny_model(), tmp_path / "a.kvtrace")
    monkeypatch.setattr(validate.models.causal, "has_cpu_flash", lambda: False)
    blocked = decode(tiny_model(), tmp_path / "b.kvtrace")
    assert_close_traces(fused, blocked)
    check_trace(blocked)


@pytest.mark.parametrize("hold", [1, 7, 10_000])
def test_waiting_tokens_do_not_change_the_trace(tmp_path, monkeypatch, hold):
    expected = decode(tiny_model(), tmp_path / "a.kvtrace", with_values=True)
    monkeypatch.setattr(validate.record.decode, "HOLD_ON_HOST", hold)
    held = decode(tiny_model(), tmp_path / "b.kvtrace", with_values=True)
    assert held.trace_id == expected.trace_id


class Appended:
    """Stands for a writer; keeps what it is given."""

    shape, scale, with_values = ModelShape(2, 4, 2, 8, "float32"), 0.5, True

    def __init__(self):
        self.arrays = []

    def append(self, layer, *arrays):
        self.arrays.append((layer, [array.shape[1] for array in arrays]))


def test_no_more_waits_than_allowed_and_none_of_it_is_the_cache():
    writer = Appended()
    recorder = TraceRecorder(writer, hold=4)
    n_entries = 0
    for n_tokens in (9, 1, 1, 1, 2, 1):
        n_entries += n_tokens
        cache = torch.zeros(2, n_entries, 8)
        queries, lse = torch.zeros(4, n_tokens, 8), torch.zeros(4, n_tokens)
        for layer in range(2):
            recorder.observe(LayerCall(layer, queries, cache, cache, lse, 0.5, None))
            held = [array for arrays in recorder._held[layer] for array in arrays]
            assert sum(array.shape[1] for array in held[::4]) < 4
            assert all(array.untyped_storage().nbytes() <= queries.nbytes for array in held)
    recorder.flush()
    sizes = [(layer, [n] * 4) for n in (9, 5, 1) for layer in range(2)]
    assert writer.arrays == sizes


def test_a_call_that_does_not_continue_the_text_is_refused():
    recorder = TraceRecorder(Appended())
    queries, lse, cache = torch.zeros(4, 1, 8), torch.zeros(4, 1), torch.zeros(2, 5, 8)
    with pytest.raises(UserError, match="5 entries at 1 tokens"):
        recorder.observe(LayerCall(0, queries, cache, cache, lse, 0.5, None))
    with pytest.raises(UserError, match="the trace has"):
        recorder.observe(LayerCall(1, queries, cache[:, :1], cache[:, :1], lse, 0.25, None))


@pytest.mark.parametrize("chunk", [1, 5, 13, 14])
def test_prefill_chunks_do_not_change_the_trace(tmp_path, chunk):
    expected = decode(tiny_model("qwen3"), tmp_path / "a.kvtrace")
    chunked = decode(tiny_model("qwen3"), tmp_path / "b.kvtrace", chunk=chunk)
    assert_close_traces(chunked, expected)
