"""The verb that records a file of prompts: rows, resuming, failures, exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from places import ROOT
from tiny_models import byte_tokenizer, tiny_model

import validate.record.rows
from traces.check import check_trace
from traces.errors import Interrupted, NoDeviceError, UserError
from traces.store import open_trace
from validate.cli.record import record, table_lines
from validate.problems.families import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.rows import Row

PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(2)]
ROWS = [
    {"id": "walk/1", "family": "walk", "prompt": PROBLEMS[0].prompt, "answer": PROBLEMS[0].answer}
    | {"completion": PROBLEMS[0].completion},
    {"id": 2, "problem": "walk legs think", "answer": "3", "completion": "sum 3 . answer 3"},
    {"question": PROBLEMS[1].prompt, "completion": "answer 4"},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(vocab_size=VOCABULARY_SIZE).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(saved, tmp_path, capsys):
    """Run the verb on ROWS as a program would be run; give its exit code, output and error lines."""
    app = typer.Typer()
    app.command()(record)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run_with(*options, model=saved, n=8):
        arguments = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
        arguments += [] if "--rescore" in options else ["--max-new-tokens", str(n)]
        arguments += ["--device", "cpu", *options]
        code = app(arguments, standalone_mode=False)
        captured = capsys.readouterr()
        return code or 0, captured.out.splitlines(), captured.err.splitlines()

    return run_with


def traces_in(folder):
    return {path.name: open_trace(path) for path in sorted(folder.iterdir())}


def test_each_row_becomes_a_trace(run, tmp_path, saved):
    code, out, err = run()
    assert code == 0
    assert err == []  # no progress where nobody looks
    assert [line.split()[:2] for line in out] == [
        ["trace", "status"],
        ["walk-1", "recorded"],
        ["2", "recorded"],
        ["row-3", "recorded"],
    ]
    assert [line.split()[-1] for line in out[1:]] == ["no", "no", "-"]
    traces = traces_in(tmp_path / "out")
    assert list(traces) == ["2.kvtrace", "row-3.kvtrace", "walk-1.kvtrace"]
    for trace in traces.values():
        check_trace(trace)
        assert trace.model == "tiny"
        assert len(trace.manifest.model_revision) == 12
    task = traces["walk-1.kvtrace"].manifest.task
    assert (task["id"], task["family"], task["answer"]) == ("walk/1", "walk", PROBLEMS[0].answer)
    assert task["correct"] is False
    graded = {"decoded_answer": None, "correct": False}
    assert traces["2.kvtrace"].manifest.task == {"id": "2", "answer": "3"} | graded


def test_rescoring_takes_the_completions(run, tmp_path):
    code, out, _ = run("--rescore", "--values", "--dtype", "bfloat16")
    assert code == 0
    assert out[1].split()[-1] == "yes"
    trace = open_trace(tmp_path / "out" / "walk-1.kvtrace")
    assert trace.manifest.origin == "rescored"
    assert trace.has_values
    assert trace.shape.dtype == "bfloat16"
    assert trace.text().endswith(PROBLEMS[0].completion)
    check_trace(trace)


def test_a_second_run_goes_on_where_the_first_ended(run, tmp_path):
    run("--limit", "2")
    before = {name: trace.trace_id for name, trace in traces_in(tmp_path / "out").items()}
    assert len(before) == 2
    (tmp_path / "out" / "2.kvtrace" / "manifest.json").unlink()
    code, out, err = run()
    assert code == 0
    assert [line.split()[1] for line in out[1:]] == ["kept", "recorded", "recorded"]
    assert err == ["walk-1: recorded already, kept"]
    after = traces_in(tmp_path / "out")
    assert len(after) == 3
    assert {name: after[name].trace_id for name in before} == before
    assert run("-q")[2] == []


def test_texts_decoded_together_are_those_decoded_alone(run, tmp_path):
    run(n=40)
    alone = traces_in(tmp_path / "out")
    code, out, err = run("--batch", "2", "--overwrite", n=40)
    assert (code, err) == (0, [])
    assert [line.split()[1] for line in out[1:]] == ["recorded"] * 3
    together = traces_in(tmp_path / "out")
    assert len({len(trace.token_ids) for trace in alone.values()}) > 1
    for name, trace in together.items():
        check_trace(trace)
        assert trace.token_ids.tolist() == alone[name].token_ids.tolist()
        assert trace.manifest.task == alone[name].manifest.task
        assert (trace.manifest.origin, trace.manifest.sampling) == ("rescored", alone[name].manifest.sampling)
        for layer in range(2):
            for part in ("queries", "keys", "lse"):
                mine, theirs = (own.stored(layer, part)[:] for own in (trace, alone[name]))
                np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    assert [line.split()[1] for line in run("--batch", "3", n=40)[1][1:]] == ["kept"] * 3
    assert [line.split()[1] for line in run(n=40)[1][1:]] == ["kept"] * 3


def test_only_what_is_missing_of_a_batch_is_decoded(run, tmp_path, monkeypatch):
    run("--batch", "3")
    (tmp_path / "out" / "2.kvtrace" / "manifest.json").unlink()
    decoded, whole = [], validate.record.rows.complete

    def complete(loaded, prompts, *settings):
        decoded.append(len(prompts))
        return whole(loaded, prompts, *settings)

    monkeypatch.setattr(validate.record.rows, "complete", complete)
    assert [line.split()[1] for line in run("--batch", "3")[1][1:]] == ["kept", "recorded", "kept"]
    assert decoded == [1]


def test_sampled_texts_are_the_same_alone_and_together(run, tmp_path):
    settings = ["--temperature", "1.0", "--seed", "3"]
    run(*settings, n=30)
    alone = {name: trace.token_ids.tolist() for name, trace in traces_in(tmp_path / "out").items()}
    run(*settings, "--batch", "3", "--overwrite", n=30)
    together = traces_in(tmp_path / "out")
    assert {name: trace.token_ids.tolist() for name, trace in together.items()} == alone
    assert {trace.manifest.seed for trace in together.values()} == {3}


def test_a_row_that_cannot_be_decoded_fails_alone(run, tmp_path, monkeypatch):
    whole = validate.record.rows.encode_prompt

    def encode_prompt(tokenizer, text, use_chat_template, system):
        if text == "walk legs think":
            raise UserError("no such template")
        return whole(tokenizer, text, use_chat_template, system)

    monkeypatch.setattr(validate.record.rows, "encode_prompt", encode_prompt)
    code, out, err = run("--batch", "3")
    assert (code, len(err)) == (1, 1)
    assert "no such template" in err[0]
    assert [line.split()[1] for line in out[1:]] == ["recorded", "failed", "recorded"]


def test_a_batch_whose_texts_one_pass_would_rotate_otherwise_is_decoded_alone(run, tmp_path):
    folder = tmp_path / "dynamic"
    tiny_model(rope="dynamic", max_position_embeddings=64, vocab_size=VOCABULARY_SIZE).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    code, out, _ = run("--batch", "3", model=folder, n=70)
    assert (code, [line.split()[1] for line in out[1:]]) == (0, ["recorded"] * 3)
    assert {trace.manifest.origin for trace in traces_in(tmp_path / "out").values()} == {"decoded"}


def test_a_batch_that_is_too_much_is_told_and_its_rows_are_recorded(run, monkeypatch):
    def complete(*_):
        raise RuntimeError("not enough memory: you tried to allocate 3 bytes\nand more")

    monkeypatch.setattr(validate.record.rows, "complete", complete)
    code, out, err = run("--batch", "3")
    assert (code, [line.split()[1] for line in out[1:]]) == (0, ["recorded"] * 3)
    assert err == [
        "sim: 3 texts cannot be decoded together: RuntimeError: not enough memory: you tried to allocate 3 "
        "bytes; each is decoded by itself"
    ]


def test_a_batch_is_refused_beyond_a_sliding_window_row_by_row(run, tmp_path):
    folder = tmp_path / "sliding"
    model = tiny_model("mistral", vocab_size=VOCABULARY_SIZE, sliding_window=40)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    alone = run("--batch", "1", model=folder, n=30)
    assert 0 < sum("failed" in line for line in alone[1]) < 3
    together = run("--batch", "3", "--overwrite", model=folder, n=30)
    assert (together[0], together[2]) == (alone[0], [line for line in alone[2] if "failed" in line])
    assert [line.split() for line in together[1]] == [line.split() for line in alone[1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "0"], "--batch is 0; allowed: 1 to 4096"),
        (["--batch", "2", "--rescore"], "--batch 2 contradicts --rescore"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(run, options, said):
    with pytest.raises(UserError, match=said):
        run(*options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "n", "words"),
    [
        (["--temperature", "0.7"], 8, "its seed is None, asked 0"),
        ([], 9, "its sampling is"),
        (["--rescore"], 8, "its origin is 'decoded', asked 'rescored'"),
        (["--values"], 8, "its has_values is False"),
        (["--dtype", "float16"], 8, "its dtype is 'float32', asked 'float16'"),
    ],
)
def test_another_recording_is_not_taken_for_this_one(run, tmp_path, options, n, words):
    run("--limit", "1")
    before = open_trace(tmp_path / "out" / "walk-1.kvtrace").trace_id
    code, out, err = run("--limit", "1", *options, n=n)
    assert code == 1
    assert out[1].split()[:2] == ["walk-1", "failed"]
    assert len(err) == 1
    assert words in err[0]
    assert "--overwrite" in err[0]
    assert open_trace(tmp_path / "out" / "walk-1.kvtrace").trace_id == before
    assert run("--limit", "1", "--overwrite", *options, n=n)[0] == 0
    assert run("--limit", "1", *options, n=n)[1][1].split()[1] == "kept"


def test_another_prompt_under_the_same_id_is_refused(run, tmp_path):
    run("--limit", "1")
    (tmp_path / "p.jsonl").write_text('{"prompt": "program legs", "id": "walk/1"}\n')
    code, _, err = run()
    assert code == 1
    assert "recording of another text" in err[0]


def test_a_failing_row_does_not_stop_the_others(run, tmp_path, monkeypatch):
    decode = validate.record.rows.record_decode

    def fail_second(model, tokenizer, prompt_ids, path, **settings):
        if path.name == "2.kvtrace":
            raise OSError(28, "No space left on device")
        return decode(model, tokenizer, prompt_ids, path, **settings)

    monkeypatch.setattr(validate.record.rows, "record_decode", fail_second)
    code, out, err = run()
    assert code == 1
    assert [line.split()[1] for line in out[1:]] == ["recorded", "failed", "recorded"]
    assert err == ["line 2, 2: failed: OSError: [Errno 28] No space left on device"]
    assert len(traces_in(tmp_path / "out")) == 2


def test_an_interrupt_keeps_what_is_finished(run, tmp_path, monkeypatch):
    decode = validate.record.rows.record_decode

    def interrupt_second(model, tokenizer, prompt_ids, path, **settings):
        def interrupt(n_tokens):
            if path.name == "2.kvtrace":
                raise KeyboardInterrupt

        return decode(model, tokenizer, prompt_ids, path, **settings | {"on_tokens": interrupt})

    monkeypatch.setattr(validate.record.rows, "record_decode", interrupt_second)
    with pytest.raises(Interrupted, match="interrupted with 1 row done: the same command again") as caught:
        run()
    assert caught.value.exit_code == 130
    assert list(traces_in(tmp_path / "out")) == ["walk-1.kvtrace"]
    monkeypatch.undo()
    assert run()[0] == 0


def test_sampling_options_reach_the_trace(run, tmp_path):
    options = ["--limit", "1", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"]
    assert run(*options)[0] == 0
    manifest = open_trace(tmp_path / "out" / "walk-1.kvtrace").manifest
    assert manifest.seed == 5
    assert manifest.sampling == {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_new_tokens": 8,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--greedy", "--temperature", "0.7"], "contradicts --greedy"),
        (["--rescore", "--temperature", "0.7"], "contradicts --rescore"),
        (["--top-p", "0.9"], "without --temperature"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "0.7", "--seed", "-1"], "seed is -1"),
        (["--seed", "3"], "--seed 3 is given without --temperature"),
        (["--rescore", "--max-new-tokens", "3"], "--max-new-tokens 3 contradicts --rescore"),
        (["--temperature", "0.7", "--top-p", "1.5"], "top_p is 1.5"),
        (["--limit", "0"], "limit is 0"),
        (["--dtype", "float8"], "dtype is 'float8'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--prompts", "/none.jsonl"], "cannot be read"),
        (["--model", "./none"], "is not a folder here"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(run, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run(*options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "walk What is legs"}, []),
        ({"prompt": "walk legs", "completion": "What is 3"}, ["--rescore"]),
    ],
)
def test_words_that_the_tokenizer_does_not_know_are_refused_before_anything_is_written(
    run, tmp_path, row, options
):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "walk"} | {"completion": "3"}) + "\n" + json.dumps(row)
    )
    with pytest.raises(UserError, match="line 2: the model's tokenizer does not know 'What', 'is'; allowed"):
        run(*options)
    assert not (tmp_path / "out").exists()


def test_a_limit_beyond_the_file_is_told(run, tmp_path):
    code, _, err = run("--limit", "9")
    assert (code, err) == (0, [f"sim: --limit is 9, and {tmp_path / 'p.jsonl'} has 3 rows: all are taken"])
    assert run("--limit", "3")[2] == [f"{name}: recorded already, kept" for name in ("walk-1", "2", "row-3")]


def test_no_gpu_is_said_so(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoDeviceError):
        run("--device", "cuda")


def test_rescoring_without_completions_is_refused(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "walk"}\n')
    with pytest.raises(UserError, match="line 1: no completion"):
        run("--rescore")


def test_a_model_that_cannot_be_recorded_is_refused_once(run, tmp_path):
    tiny_model("gemma2", vocab_size=VOCABULARY_SIZE).save_pretrained(tmp_path / "gemma2")
    build_tokenizer().save_pretrained(tmp_path / "gemma2")
    with pytest.raises(UserError, match="soft-capped"):
        run(model=tmp_path / "gemma2")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be made"):
        run()


def test_chat_template_can_be_turned_off(run, tmp_path):
    folder = tmp_path / "chat"
    template = "{{ bos_token }}{{ messages[0].content }}<eos>"
    tiny_model(vocab_size=320).save_pretrained(folder)
    byte_tokenizer(chat_template=template).save_pretrained(folder)
    (tmp_path / "p.jsonl").write_text('{"prompt": "step by step", "id": "a"}\n')
    path = tmp_path / "out" / "a.kvtrace"
    run(model=folder)
    assert open_trace(path).text().startswith("<bos>step by step<eos>")
    run("--no-chat", "--overwrite", model=folder)
    assert open_trace(path).text().startswith("step by step")


def test_table_is_aligned():
    rows = [Row("a", "recorded", 10, 2000, True), Row("longer", "failed", error="x")]
    assert table_lines(rows) == [
        "trace   status    prompt_tokens  total_tokens  correct",
        "a       recorded  10             2000          yes",
        "longer  failed    -              -             -",
    ]


def test_importing_the_verb_does_not_import_torch():
    script = "import sys, validate.cli.record; sys.exit('torch' in sys.modules)"
    folder = ROOT
    assert subprocess.run([sys.executable, "-c", script], cwd=folder, check=False).returncode == 0
