"""Recorded traces: the same tokens as the model's own generation, and exactly what attention used."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from places import ROOT, TESTS
from tiny_models import byte_tokenizer, marked_tokenizer, tiny_model

import validate.models.causal
import validate.record.decode
from traces.check import check_trace
from traces.errors import TraceError, UserError
from traces.shape import ModelShape
from traces.store import open_trace
from validate.models.attention_hook import RECORDER_ATTRIBUTE, LayerCall
from validate.models.vocabulary import vocabulary_of
from validate.problems.families import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.decode import record_decode, record_rescore
from validate.record.recorder import TraceRecorder

PROMPT = [1, 5, 6, 7, 8, 9, 10, 11, 5, 6, 30, 31, 5]
MODELS = [
    ("llama", 4, "default"),
    ("llama", 2, "llama3"),
    ("qwen2", 1, "linear"),
    ("qwen2", 4, "default"),
    ("qwen3", 2, "yarn"),
    ("qwen3", 4, "default"),
    ("mistral", 2, "default"),
]


def decode(model, path, n=30, **settings):
    return record_decode(model, None, PROMPT, path, max_new_tokens=n, stop_ids=(), **settings)


def assert_close_traces(first, second, tolerance=1e-4, names=("queries", "keys", "lse")):
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    for layer in range(first.shape.n_layers):
        for name in names:
            found, expected = getattr(first, name)(layer), getattr(second, name)(layer)
            np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "n_kv_heads", "rope"), MODELS)
def test_greedy_tokens_equal_generate(tmp_path, kind, n_kv_heads, rope, implementation):
    model = tiny_model(kind, n_kv_heads, rope)
    trace = decode(model, tmp_path / "a.kvtrace")
    model.set_attn_implementation(implementation)
    generated = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert trace.token_ids.tolist() == generated[0].tolist()
    assert len(set(trace.token_ids[len(PROMPT) :])) > 3  # not one token over and over


@pytest.mark.parametrize(("kind", "n_kv_heads", "rope"), MODELS)
def test_rescore_equals_decode(tmp_path, kind, n_kv_heads, rope):
    model = tiny_model(kind, n_kv_heads, rope)
    decoded = decode(model, tmp_path / "a.kvtrace", with_values=True, chunk=5)
    completion = decoded.token_ids[len(PROMPT) :].tolist()
    rescored = record_rescore(model, PROMPT, completion, tmp_path / "b.kvtrace", with_values=True, chunk=16)
    assert_close_traces(decoded, rescored, names=("queries", "keys", "lse", "values"))
    assert decoded.manifest.origin == "decoded"
    assert rescored.manifest.origin == "rescored"
    assert rescored.prompt_tokens == decoded.prompt_tokens == len(PROMPT)
    check_trace(decoded, samples=200)
    check_trace(rescored, samples=200)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fused", [True, False])
def test_16_bit_traces_hold_every_invariant(tmp_path, monkeypatch, kind, dtype, fused):
    monkeypatch.setattr(validate.models.causal, "has_cpu_flash", lambda: fused)
    model = tiny_model(kind, 2, dtype=dtype)
    decoded = decode(model, tmp_path / "a.kvtrace")
    completion = decoded.token_ids[len(PROMPT) :].tolist()
    rescored = record_rescore(model, PROMPT, completion, tmp_path / "b.kvtrace", chunk=10)
    for trace in (decoded, rescored):
        assert trace.shape.dtype == dtype
        check_trace(trace, samples=300)


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


def test_the_last_token_is_recorded_too(tmp_path):
    model = tiny_model()
    free = decode(model, tmp_path / "a.kvtrace").token_ids[len(PROMPT) :].tolist()
    stop = free[4]
    seen = []
    trace = record_decode(
        model,
        None,
        PROMPT,
        tmp_path / "b.kvtrace",
        max_new_tokens=30,
        stop_ids=[stop],
        on_tokens=seen.append,
    )
    n_new = free.index(stop) + 1
    assert trace.token_ids.tolist() == PROMPT + free[:n_new]
    assert trace.queries(1).shape[1] == len(PROMPT) + n_new == seen[-1]
    check_trace(trace)


def test_stop_ids_come_from_the_model(tmp_path):
    model = tiny_model()
    free = decode(model, tmp_path / "a.kvtrace").token_ids[len(PROMPT) :].tolist()
    model.generation_config.eos_token_id = [95, free[2]]
    trace = record_decode(model, None, PROMPT, tmp_path / "b.kvtrace", max_new_tokens=30)
    assert trace.total_tokens == len(PROMPT) + free.index(free[2]) + 1


def test_sampling_depends_on_the_seed_alone(tmp_path):
    model = tiny_model()
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.95}
    traces = [
        decode(model, tmp_path / f"{name}.kvtrace", seed=seed, **settings)
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    ]
    assert traces[0].trace_id == traces[1].trace_id
    assert traces[0].token_ids.tolist() != traces[2].token_ids.tolist()
    assert traces[0].manifest.seed == 7
    assert traces[0].manifest.sampling == settings | {"max_new_tokens": 30}
    check_trace(traces[0])


def test_manifest_names_model_and_task(tmp_path):
    task = {"id": "p1", "family": "algebra", "answer": "4"}
    trace = decode(
        tiny_model(rope="llama3"),
        tmp_path / "a.kvtrace",
        model_name="org/tiny",
        model_revision="abc",
        task=task,
    )
    manifest = trace.manifest
    assert (manifest.model, manifest.model_revision, manifest.task) == ("org/tiny", "abc", task)
    assert manifest.rope["rope_type"] == "llama3"
    assert manifest.rope["factor"] == 8.0
    assert manifest.scale == 8**-0.5
    assert manifest.seed is None
    assert manifest.sampling == {"do_sample": False, "max_new_tokens": 30}
    assert manifest.writer["transformers"]


@pytest.mark.parametrize("correct", [True, False])
def test_answer_of_the_reasoners_families_is_graded(tmp_path, correct):
    tokenizer, problem = build_tokenizer(), make_problem("program", 1, 0, size=4, length=60)
    completion = tokenizer(problem.completion, add_special_tokens=False).input_ids
    answer = problem.answer if correct else "no"
    trace = record_rescore(
        tiny_model(vocab_size=VOCABULARY_SIZE),
        tokenizer(problem.prompt).input_ids,
        [*completion, tokenizer.eos_token_id],
        tmp_path / "a.kvtrace",
        tokenizer=tokenizer,
        task={"id": problem.id, "family": "program", "answer": answer},
    )
    assert trace.manifest.task["decoded_answer"] == problem.answer
    assert trace.manifest.task["correct"] is correct
    assert trace.text() == f" <bos> {problem.prompt} {problem.completion} <eos>"


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, marked_tokenizer, build_tokenizer])
def test_vocabulary_pieces_join_to_the_text(make_tokenizer):
    tokenizer = make_tokenizer()
    text = "walk to 3 , naive answer step by step"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = vocabulary_of(tokenizer, ids)
    assert sorted(pieces) == sorted(set(ids))
    joined = "".join(pieces[token] for token in ids)
    assert joined.strip() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def test_part_of_a_character_is_shown_as_replacement():
    tokenizer = byte_tokenizer()
    ids = tokenizer("→ 中", add_special_tokens=False).input_ids
    pieces = vocabulary_of(tokenizer, ids)
    assert "�" in "".join(pieces.values())
    assert vocabulary_of(None, ids) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_recording_leaves_no_trace(tmp_path, error):
    model, path = tiny_model(), tmp_path / "a.kvtrace"
    before = model.config._attn_implementation

    def interrupt(n_tokens):
        if n_tokens > 20:
            raise error

    with pytest.raises(error):
        decode(model, path, on_tokens=interrupt)
    with pytest.raises(TraceError):
        open_trace(path)
    assert model.config._attn_implementation == before
    assert not any(hasattr(module, RECORDER_ATTRIBUTE) for module in model.modules())
    check_trace(decode(model, path))


def test_killed_recording_leaves_no_trace(tmp_path):
    path = tmp_path / "a.kvtrace"
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(TESTS / "tools")!r})
        from tiny_models import tiny_model
        from validate.record.decode import record_decode
        kill = lambda n: n > 40 and os.kill(os.getpid(), signal.SIGKILL)
        record_decode(tiny_model(), None, [3, 4, 5], {str(path)!r}, max_new_tokens=60, stop_ids=(),
                      on_tokens=kill)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert any(tmp_path.iterdir())  # it had begun to write
    with pytest.raises(TraceError):
        open_trace(path)
    check_trace(decode(tiny_model(), path))
    assert [found.name for found in tmp_path.iterdir()] == ["a.kvtrace"]


def test_finished_trace_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.kvtrace"
    first = decode(tiny_model(), path)
    with pytest.raises(UserError, match=r"a\.kvtrace"):
        decode(tiny_model(), path)
    second = decode(tiny_model(seed=1), path, overwrite=True)
    assert second.trace_id != first.trace_id


def test_sliding_window_bounds_the_length(tmp_path):
    model = tiny_model("mistral", sliding_window=43)
    with pytest.raises(UserError, match=r"44 tokens .* at most its 43"):
        decode(model, tmp_path / "a.kvtrace", n=31)
    assert not list(tmp_path.iterdir())
    check_trace(decode(model, tmp_path / "a.kvtrace", n=30))


def test_rope_that_depends_on_the_length_is_not_rescored(tmp_path):
    model = tiny_model(rope="dynamic", max_position_embeddings=32)
    with pytest.raises(UserError, match="'dynamic' changes beyond 32"):
        record_rescore(model, PROMPT, [5] * 20, tmp_path / "a.kvtrace")
    record_rescore(model, PROMPT, [5] * 19, tmp_path / "a.kvtrace")
    check_trace(decode(model, tmp_path / "b.kvtrace"))


def test_a_model_that_overflows_leaves_no_trace(tmp_path):
    model = tiny_model()
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        decode(model, tmp_path / "a.kvtrace")
    with pytest.raises(TraceError):
        open_trace(tmp_path / "a.kvtrace")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_ids": []}, "prompt has 0 tokens"),
        ({"prompt_ids": [3, 96]}, "token id 96 found; the model knows 0 to 95"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ({"path": "a.trace"}, "a.trace"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, words):
    settings = {"prompt_ids": PROMPT, "path": "a.kvtrace", "max_new_tokens": 2} | settings
    prompt_ids, path = settings.pop("prompt_ids"), tmp_path / settings.pop("path")
    with pytest.raises(UserError, match=words):
        record_decode(tiny_model(), None, prompt_ids, path, **settings)
    assert not list(tmp_path.iterdir())


def test_empty_completion_is_refused(tmp_path):
    with pytest.raises(UserError, match="completion has 0 tokens"):
        record_rescore(tiny_model(), PROMPT, [], tmp_path / "a.kvtrace")
