"""Recorded traces: the same tokens as the model's own generation, whole or not there at all."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from places import ROOT, TESTS
from recording import PROMPT, assert_close_traces, decode
from tiny_models import tiny_model

import validate.models.causal
import validate.record.decode
from traces.check import check_trace
from traces.errors import TraceError, UserError
from traces.store import open_trace
from validate.models.attention_hook import RECORDER_ATTRIBUTE
from validate.problems.families import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.decode import record_decode, record_rescore

MODELS = [
    ("llama", 4, "default"),
    ("llama", 2, "llama3"),
    ("qwen2", 1, "linear"),
    ("qwen2", 4, "default"),
    ("qwen3", 2, "yarn"),
    ("qwen3", 4, "default"),
    ("mistral", 2, "default"),
]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
