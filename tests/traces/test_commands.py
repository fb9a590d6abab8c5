"""Finding traces, and the verbs of ``sim trace``: what they print and what they refuse."""

import json
import os
import shutil

import naive_traces as naive
import pytest
from typer.testing import CliRunner

from traces import TraceError, UserError, find_traces, open_trace
from validate.cli.main import tracing


def invoke(*arguments):
    """Run a verb; errors for the user are left to the caller, as the main program does."""
    return CliRunner().invoke(tracing, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path):
    """Return a directory with traces a, b and, a level deeper, c."""
    naive.small_trace(tmp_path / "runs" / "a.kvtrace")
    shutil.copytree(tmp_path / "runs" / "a.kvtrace", tmp_path / "runs" / "b.kvtrace")
    shutil.copytree(tmp_path / "runs" / "a.kvtrace", tmp_path / "runs" / "deep" / "c.kvtrace")
    (tmp_path / "runs" / ".d.kvtrace.partial").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("")
    return tmp_path / "runs"


def test_find_traces_takes_paths_directories_and_globs(runs):
    a, b, c = runs / "a.kvtrace", runs / "b.kvtrace", runs / "deep" / "c.kvtrace"
    assert find_traces([a]) == [a]
    assert find_traces(a) == [a]
    assert find_traces([runs]) == [a, b]
    assert find_traces([str(runs / "*")]) == [a, b, c]
    assert find_traces([f"{runs}/**/*.kvtrace"]) == [a, b, c]
    assert find_traces([c, runs, b, f"{runs}/[ab].kvtrace"]) == [a, b, c]
    os.symlink(a, runs / "again.kvtrace")
    assert find_traces([runs]) == [a, b]


def test_find_traces_takes_names_that_look_like_globs(tmp_path):
    trace = naive.small_trace(tmp_path / "run[1].kvtrace")
    assert find_traces([trace.path]) == [trace.path]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "nothing.kvtrace",
            "not found; .*allowed: a directory NAME.kvtrace, a folder of them, or a glob in quotes",
        ),
        ("b.kvtrac", "not found; did you mean 'b.kvtrace'?"),
        ("*.npz", "matches no trace"),
        ("notes.txt", "a file, not a directory"),
        ("weights.pt", "a file, not a directory; allowed: .*; traces of a model are recorded by sim record"),
        ("empty", r"a folder without a trace \(it is empty\)"),
        ("model", "a model's folder; .*; traces of a model are recorded by sim record --model"),
        ("a/b/c", "not found"),
        ("a\0b", "not found"),
    ],
)
def test_find_traces_says_what_is_there_in_place_of_a_trace(runs, pattern, words):
    for folder in ("empty", "model"):
        (runs / folder).mkdir()
    (runs / "weights.pt").touch()
    (runs / "model" / "config.json").write_text("{}")
    with pytest.raises(TraceError, match=words) as refusal:
        find_traces([runs / "a.kvtrace", runs / pattern])
    assert pattern in str(refusal.value)


def test_a_name_of_a_hub_is_not_taken_for_a_trace():
    with pytest.raises(
        TraceError, match="if it is a model of a hub, traces of a model are recorded by sim rec"
    ):
        find_traces(["some-org/some-model"])


def test_info_tells_fields_as_lines_and_as_json(tmp_path):
    trace = naive.small_trace(
        tmp_path / "t.kvtrace", dtype="bfloat16", model="tiny\n", vocabulary={0: "a"},
        task={"id": "p-1", "truth": {"sinks": [0]}},
    )  # fmt: skip
    lines = dict(line.split(None, 1) for line in invoke("info", trace.path).stdout.splitlines())
    assert lines["trace_id"] == trace.trace_id
    assert lines["model"] == r"tiny\n"
    assert lines["task"] == "id=p-1"
    assert lines["decoded_tokens"] == "17"
    facts = json.loads(invoke("info", trace.path, "--format", "json").stdout)
    assert facts["model"] == "tiny\n"
    assert facts["task"]["truth"] == {"sinks": [0]}
    assert facts["vocabulary_size"] == 1
    assert facts["bytes"] == sum(file.stat().st_size for file in trace.path.glob("*.safetensors"))
    assert facts["bytes_per_entry"] == 32


@pytest.mark.parametrize("verb", ["info", "head", "validate"])
def test_a_missing_trace_is_left_to_the_main_program(tmp_path, verb):
    result = invoke(verb, tmp_path / "none.kvtrace")
    assert isinstance(result.exception, TraceError)


def test_validate_checks_all_and_then_raises_the_first_error(runs):
    assert invoke("validate", runs).exit_code == 0
    damaged = runs / "a.kvtrace" / "layer_000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x99")
    (runs / "deep" / "c.kvtrace" / "manifest.json").unlink()
    result = invoke("validate", runs / "a.kvtrace", "none", runs / "b.kvtrace", runs / "deep")
    assert isinstance(result.exception, TraceError)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED", "FAILED", "ok", "FAILED"]
    assert lines[0] == f"FAILED {result.exception}"
    assert "not found" in lines[1]
    assert "2 layers" in lines[2] or "3 files" in lines[2]
    assert "unfinished" in lines[3]


def test_head_shows_text_with_positions(tmp_path):
    pieces = {0: "once ", 1: "upon\n", 2: "a ", 3: "\x1b[31mtime", 7: "and ", 8: "then"}
    trace = naive.small_trace(tmp_path / "t.kvtrace", vocabulary=pieces, prompt_tokens=7)
    output = invoke("head", trace.path, "-n", "3").stdout
    assert output.splitlines() == [
        "prompt: 7 tokens",
        r"       0  once upon\n",
        r"       2  a \x1b[31mtime<4><5><6>",
        "",
        "decoded: first 3 of 17 tokens",
        "       7  and then<9>",
    ]


def test_head_of_a_long_trace_breaks_lines_and_leaves_out_the_middle(tmp_path):
    trace = naive.small_trace(
        tmp_path / "t.kvtrace", n_layers=1, n_tokens=900, prompt_tokens=800, token_ids=[7] * 900
    )
    prompt, decoded = invoke("head", trace.path, "-n", "1000").stdout.split("\n\n")
    first, last = prompt.split("     ...\n")
    for text, n_tokens, start in [(first, 256, 0), (last, 256, 544), (decoded, 100, 800)]:
        position = start
        for line in text.splitlines()[0 if start == 544 else 1 :]:
            assert len(line) <= 98
            label, *ids = line.split()
            assert int(label) == position
            position += len(ids)
        assert position == start + n_tokens


def test_make_writes_a_trace_that_validates(tmp_path):
    path = tmp_path / "made" / "t.kvtrace"
    arguments = ("make", path, "--layers", 1, "--total-tokens", 300, "--seed", 4, "--values")
    result = invoke(*arguments)
    trace = open_trace(path)
    assert result.stdout.split() == [str(path), trace.trace_id]
    assert (trace.total_tokens, trace.has_values, trace.manifest.seed) == (300, True, 4)
    assert invoke("validate", path).exit_code == 0
    assert isinstance(invoke(*arguments).exception, UserError)
    assert invoke(*arguments, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t.kvtrace", "--kv-heads", "3"], "n_query_heads is 8; allowed: a multiple"),
        (["t.kvtrace", "--head-dim", "4"], "head_dim is 4; allowed: 8 or more"),
        (["t.kvtrace", "--prompt-tokens", "2000"], "prompt_tokens is 2000; allowed: 1 to 1024"),
        (["t.kvtrace", "--dtype", "int8"], "dtype is 'int8'"),
        (["t.kvtrace", "--seed", "-1"], "seed is -1; allowed: a whole number from 0"),
        (["t.npz"], "allowed: a directory named NAME.kvtrace"),
        (["file/t.kvtrace"], "cannot be written: Not a directory"),
    ],
)
def test_make_refuses_in_words(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    error = invoke("make", *arguments).exception
    assert isinstance(error, UserError)
    assert message in str(error)
    assert os.listdir(tmp_path) == ["file"]
