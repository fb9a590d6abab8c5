"""A directory appears when a recording is complete, and never before."""

import os
import signal
import subprocess
import sys
import tracemalloc

import naive_traces as naive
import numpy as np
import pytest

from traces import ModelShape, TraceError, TraceWriter, UserError, check_trace, open_trace

SHAPE = ModelShape(2, 4, 2, 8, "float16")


def chunk(n=5, **changes):
    """Return the arrays of one append of ``n`` tokens."""
    arrays = {
        "queries": np.ones((4, n, 8), np.float16),
        "keys": np.ones((2, n, 8), np.float16),
        "lse": np.ones((4, n), np.float32),
    }
    return arrays | changes


def finish(writer, n=5, **changes):
    """Finish a recording of ``n`` tokens."""
    fields = {"prompt_tokens": 2, "model": "m", "origin": "decoded", **changes}
    return writer.finish(fields.pop("token_ids", range(n)), **fields)


def start(tmp_path, n=5, **options):
    """Begin a recording with ``n`` tokens in both layers."""
    writer = TraceWriter(tmp_path / "t.kvtrace", SHAPE, **options)
    writer.append(0, **chunk(n))
    writer.append(1, **chunk(n))
    return writer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": np.ones((4, 6, 8), np.float16)}, r"keys has shape \(2, 5, 8\); allowed"),
        ({"queries": np.ones((2, 5, 8), np.float16)}, "queries has shape"),
        ({"queries": np.float16(1)}, "queries has shape"),
        ({"keys": np.ones((2, 5, 7), np.float16)}, "keys has shape"),
        ({"lse": np.ones((4, 5, 1), np.float32)}, "lse has shape"),
        ({"lse": np.ones((4, 5), np.float64)}, "lse: type float64 found"),
        ({"keys": np.ones((2, 5, 8), np.uint16)}, "keys: type uint16 found; allowed: float16"),
        ({"keys": np.full((2, 5, 8), 1.0001, np.float32)}, "without rounding"),
        ({"keys": np.full((2, 5, 8), np.nan, np.float16)}, "keys holds NaN or infinity"),
        ({"lse": np.full((4, 5), -np.inf, np.float32)}, "lse holds NaN or infinity"),
        ({"values": np.ones((2, 5, 8), np.float16)}, "values are given"),
    ],
)
def test_append_refuses_in_words_and_goes_on(tmp_path, changes, message):
    with start(tmp_path) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(0, **chunk(**changes))
        assert finish(writer).total_tokens == 5


def test_append_refuses_missing_values_and_unknown_layers(tmp_path):
    with TraceWriter(tmp_path / "t.kvtrace", SHAPE, with_values=True) as writer:
        with pytest.raises(ValueError, match="values are missing"):
            writer.append(0, **chunk())
        with pytest.raises(ValueError, match="layer is 2; allowed: 0 to 1"):
            writer.append(2, **chunk())


def test_append_takes_float32_that_is_exact(tmp_path):
    queries = (np.arange(160, dtype=np.float32) / 8).reshape(4, 5, 8)
    with TraceWriter(tmp_path / "t.kvtrace", SHAPE) as writer:
        for layer in range(2):
            writer.append(layer, **chunk(queries=queries))
        np.testing.assert_array_equal(finish(writer).queries(1), queries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 4}, "layer 0 holds 5 tokens, token_ids 4"),
        ({"n": 0}, "at least one integer"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; allowed: 1 to 5"),
        ({"prompt_tokens": 6}, "prompt_tokens is 6; allowed: 1 to 5"),
        ({"prompt_tokens": 2.5}, "prompt_tokens is 2.5"),
        ({"origin": "dreamt"}, "origin is 'dreamt'; allowed: decoded, rescored, synthetic"),
        ({"token_ids": [0, 1, 2, 3, -4]}, "token_ids are -4 to 3"),
        ({"token_ids": [0, 1, 2, 3, 2**31]}, "allowed: 0 to 2147483647"),
        ({"token_ids": [0.0] * 5}, "token_ids is float64"),
        ({"rope": {"theta": float("nan")}}, "JSON"),
        ({"task": {"answer": object()}}, "cannot be written as JSON"),
        ({"vocabulary": {-1: "a"}}, "vocabulary has key -1"),
        ({"vocabulary": {1: b"a"}}, r"vocabulary\[1\] is b'a'"),
    ],
)
def test_finish_refuses_in_words_and_can_be_repeated(tmp_path, changes, message):
    with start(tmp_path) as writer:
        with pytest.raises(ValueError, match=message):
            finish(writer, **changes)
        assert not writer.path.exists()
        assert finish(writer).total_tokens == 5


def test_layers_of_unequal_length_are_refused(tmp_path):
    with start(tmp_path) as writer:
        writer.append(1, **chunk(1))
        with pytest.raises(ValueError, match="layer 1 holds 6 tokens, token_ids 5"):
            finish(writer)


def test_scale_and_suffix_are_refused_before_anything_is_written(tmp_path):
    for scale in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="allowed: a positive finite number"):
            TraceWriter(tmp_path / "t.kvtrace", SHAPE, scale=scale)
    with pytest.raises(UserError, match=r"allowed: a directory named NAME.kvtrace"):
        TraceWriter(tmp_path / "t.trace", SHAPE)
    assert os.listdir(tmp_path) == []


def test_only_the_trace_is_left_when_finished(tmp_path):
    with start(tmp_path) as writer:
        trace = finish(writer)
    assert os.listdir(tmp_path) == ["t.kvtrace"]
    assert sorted(os.listdir(trace.path)) == [
        "layer_000.safetensors", "layer_001.safetensors", "manifest.json", "tokens.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="finished or given up"):
        writer.append(0, **chunk())


def test_an_exception_or_abort_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), start(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []
    writer = start(tmp_path)
    writer.abort()
    writer.abort()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="finished or given up"):
        finish(writer)
    with start(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_finished_trace_is_kept_until_its_replacement_is_complete(tmp_path):
    earlier = naive.small_trace(tmp_path / "t.kvtrace")
    with pytest.raises(UserError, match="a finished trace is there"):
        start(tmp_path)
    check_trace(open_trace(earlier.path))
    with start(tmp_path, overwrite=True):
        check_trace(open_trace(earlier.path))
    assert open_trace(earlier.path).trace_id == earlier.trace_id
    with start(tmp_path, overwrite=True) as writer:
        replacement = finish(writer)
    assert open_trace(earlier.path).trace_id == replacement.trace_id != earlier.trace_id
    assert os.listdir(tmp_path) == ["t.kvtrace"]
    with pytest.raises(TraceError, match="changed since it was opened"):
        earlier.queries(0)


def test_a_trace_moved_aside_by_a_killed_replacement_comes_back(tmp_path):
    earlier = naive.small_trace(tmp_path / "t.kvtrace")
    os.rename(earlier.path, tmp_path / ".t.kvtrace.replaced")
    with pytest.raises(UserError, match="a finished trace is there"):
        start(tmp_path)
    check_trace(open_trace(earlier.path))


def test_unfinished_leftovers_are_replaced_and_foreign_files_are_not(tmp_path):
    path = tmp_path / "t.kvtrace"
    path.mkdir()
    (path / "layer_000.safetensors").write_bytes(b"half")
    (tmp_path / ".t.kvtrace.partial").mkdir()
    (tmp_path / ".t.kvtrace.partial" / "layer_000.keys.part").write_bytes(b"old tokens")
    with start(tmp_path) as writer:
        trace = finish(writer)
    assert trace.keys(0).shape == (2, 5, 8)
    assert os.listdir(tmp_path) == ["t.kvtrace"]

    other = tmp_path / "home.kvtrace"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.txt'"):
        TraceWriter(other, SHAPE, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file.kvtrace").write_text("")
    with pytest.raises(UserError, match="a file is there"):
        TraceWriter(tmp_path / "file.kvtrace", SHAPE, overwrite=True)


RECORD = """
import sys
import numpy as np
from traces import ModelShape, TraceWriter
writer = TraceWriter(sys.argv[1], ModelShape(1, 4, 2, 64, "float16"), overwrite=True)
def append(n):
    writer.append(0, np.ones((4, n, 64), "f2"), np.ones((2, n, 64), "f2"), np.ones((4, n), "f4"))
"""


def test_a_killed_recording_is_no_trace_and_the_next_one_starts_clean(tmp_path):
    path = tmp_path / "t.kvtrace"
    code = RECORD + "append(9); print('recording', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"recording\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert os.listdir(tmp_path) == [".t.kvtrace.partial"]
    with pytest.raises(TraceError, match="not found"):
        open_trace(path)
    with start(tmp_path) as writer:
        assert finish(writer).total_tokens == 5
    assert os.listdir(tmp_path) == ["t.kvtrace"]


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("append_limit", [True, False])
def test_a_full_disk_is_an_oserror_and_leaves_no_manifest(tmp_path, existing, append_limit):
    path = tmp_path / "t.kvtrace"
    earlier = naive.small_trace(path).trace_id if existing else None
    code = RECORD + (
        "import resource\n"
        "append(100)\n"
        "limit = 60_000 if sys.argv[2] == 'append' else 53_000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    if sys.argv[2] == 'append': append(100)\n"
        "    writer.finish(range(100), prompt_tokens=1, model='m', origin='decoded')\n"
        "except OSError as error:\n"
        "    print('full')\n"
    )
    # 100 tokens are parts of up to 51,200 bytes, and a layer file of 78,400 and more.
    arguments = [sys.executable, "-c", code, str(path), "append" if append_limit else "finish"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout == "full\n"
    if existing:
        assert open_trace(path).trace_id == earlier
    assert os.listdir(tmp_path) == (["t.kvtrace"] if existing else [])


@pytest.mark.slow
def test_finishing_holds_a_group_of_heads_in_memory_not_a_layer(tmp_path):
    shape = ModelShape(1, 16, 8, 128, "float16")
    n_tokens = 16_384  # 4 MiB for each of 24 heads: 96 MiB
    writer = TraceWriter(tmp_path / "t.kvtrace", shape)
    rows = 2048
    for _ in range(0, n_tokens, rows):
        writer.append(
            0,
            np.ones((16, rows, 128), np.float16),
            np.ones((8, rows, 128), np.float16),
            np.ones((16, rows), np.float32),
        )
    tracemalloc.start()
    trace = writer.finish(range(n_tokens), prompt_tokens=1, model="m", origin="decoded")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20
    assert trace.manifest.files["layer_000.safetensors"]["size"] > 96 * 2**20
