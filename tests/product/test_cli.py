"""The command line as a user meets it: output, one-line errors, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from naive_traces import reseal

from simulator.policies.shipped import ALIASES, HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS, TRIGGERS
from simulator.results.tables import RETAINED_SCHEMA, ROW_SCHEMA, TRAJECTORY_SCHEMA


@pytest.fixture
def trace_path(make_trace):
    return make_trace(n_tokens=90, prompt_tokens=30).path


def one_line(err, *words):
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("sim: ")
    for word in words:
        assert str(word) in err


def test_replay_prints_a_row_per_policy_and_budget(run_sim, trace_path):
    code, out, err = run_sim(
        "replay", "--trace", trace_path, "-p", "rkv,snapkv:window=4", "--buffer", 5, "-b", "20,50%"
    )
    assert (code, err) == (0, "")
    assert out.count("snapkv:window=4") == 2
    assert "60 decode steps" in out


def test_formats_hold_the_agreed_columns(run_sim, trace_path, tmp_path):
    base = ["replay", "--trace", trace_path, "--policy", "rkv,random", "--budget", "20", "-q"]
    code, out, _ = run_sim(*base, "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert [row["policy"] for row in rows] == ["rkv", "random"]
    assert list(rows[0]) == list(ROW_SCHEMA)
    _, out, _ = run_sim(*base, "--format", "csv")
    assert out.splitlines()[0].split(",") == list(ROW_SCHEMA)
    code, out, _ = run_sim(*base, "-o", tmp_path / "rows.parquet")
    assert (code, out) == (0, "")
    table = pl.read_parquet(tmp_path / "rows.parquet")
    assert table.schema == pl.Schema(ROW_SCHEMA)
    for row, parsed in zip(table.to_dicts(), rows, strict=True):
        assert {**row, "seconds": 0} == {**parsed, "seconds": 0}
    assert list(tmp_path.glob("*.part")) == []


def test_retained_holds_every_slot_after_every_compression(run_sim, trace_path, tmp_path):
    path = tmp_path / "kept.parquet"
    code, *_ = run_sim(
        "replay", "--trace", trace_path, "-p", "rkv", "-b", "16", "--buffer", "8", "--retained", path
    )
    assert code == 0
    kept = pl.read_parquet(path)
    assert kept.schema == pl.Schema(RETAINED_SCHEMA)
    sizes = kept.group_by("layer", "kv_head", "compression").len()["len"].unique().to_list()
    assert sizes == [16]
    # 30 prompt tokens are compressed at once, then every 8 tokens up to the end at 90.
    assert kept["n_tokens"].unique().sort().to_list() == list(range(30, 90, 8))


def test_trajectory_holds_every_span_of_every_head(run_sim, trace_path, tmp_path):
    path = tmp_path / "time.parquet"
    arguments = ["replay", "--trace", trace_path, "-p", "rkv", "-b", "16", "--buffer", "8"]
    code, *_ = run_sim(*arguments, "--trajectory", path)
    assert code == 0
    spans = pl.read_parquet(path)
    assert spans.schema == pl.Schema(TRAJECTORY_SCHEMA)
    assert spans["n_tokens"].unique().sort().to_list() == [*range(30, 90, 8), 90]
    assert spans["trace"].unique().to_list() == [trace_path.name]


@pytest.mark.parametrize(
    ("first", "second"), [("-o", "--retained"), ("-o", "--trajectory"), ("--retained", "--trajectory")]
)
def test_two_tables_do_not_share_a_file(run_sim, trace_path, tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_sim(
        "replay", "--trace", trace_path, first, "rows.parquet", second, tmp_path / "rows.parquet"
    )
    assert (code, out) == (2, "")
    one_line(err, f"{first} and {second} are both", "allowed: two files")
    assert list(tmp_path.glob("*.parquet")) == []


def test_buffer_is_a_default_that_a_policy_may_override(run_sim, trace_path):
    code, out, _ = run_sim(
        *("replay", "--trace", trace_path, "-b", "20", "--buffer", "4", "--format", "json"),
        *("-p", "rkv,rkv:buffer=9,fullkv"),
    )
    assert code == 0
    buffers = [json.loads(row["policy_params"]).get("buffer") for row in json.loads(out)]
    assert buffers == [4, 9, None]


def test_some_failed_cells_exit_1_and_keep_the_others(run_sim, trace_path):
    code, out, err = run_sim("replay", "--trace", trace_path, "-p", "rkv", "-b", "5,20", "--format", "csv")
    assert code == 1
    assert [row.split(",")[-6] for row in out.splitlines()[1:]] != []
    assert "allowed: at least 9" in err
    assert "1 of 2 cells failed" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-b", "0.1"], 2, ["0.1", "10%"]),
        (["-b", "-4"], 2, ["-4", "allowed"]),
        (["-b", "64QiB"], 2, ["QiB", "allowed"]),
        (["-p", "rkvv"], 2, ["rkvv", "did you mean 'rkv'?", "sim policies list"]),
        (["-p", "rkv+snapkv"], 2, ["second scorer"]),
        (["-p", "rkv:windw=3"], 2, ["windw", "window"]),
        (["-p", "rkv:window=many"], 2, ["many", "whole number"]),
        (["-p", "rkv:kernel_size=4"], 2, ["kernel_size", "odd"]),
        (["--format", "xml"], 2, ["xml", "parquet"]),
        (["--format", "parquet"], 2, ["-o FILE"]),
        (["-o", "nowhere/rows.csv"], 2, ["nowhere"]),
        (["--trajectory", "nowhere/rows.parquet"], 2, ["--trajectory nowhere", "existing folder"]),
        (["--jobs", "-1"], 2, ["-1"]),
        (["--unknown"], 2, ["--unknown"]),
        (["--seed", "x"], 2, ["--seed"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(run_sim, trace_path, arguments, code, words):
    found, out, err = run_sim("replay", "--trace", trace_path, *arguments)
    assert (found, out) == (code, "")
    one_line(err, *words)


def test_infeasible_budget_exits_5(run_sim, trace_path):
    code, _, err = run_sim("replay", "--trace", trace_path, "-p", "rkv", "-b", "8")
    assert code == 5
    assert "budget 8" in err.splitlines()[0]
    assert "at least 9" in err.splitlines()[0]


def test_reasonalloc_without_a_wave_exits_4_and_names_the_command(run_sim, trace_path, tmp_path):
    arguments = ["replay", "--trace", trace_path, "-p", "reasonalloc", "-b", "20"]
    code, _, err = run_sim(*arguments)
    assert code == 4
    assert "sim calibrate" in err
    (tmp_path / "wave.json").write_text("{}")
    code, _, err = run_sim(*arguments, "--wave", tmp_path / "wave.json")
    assert code == 4
    one_line(err, "wave.json")


def test_calibrate_then_reasonalloc_on_another_trace_only(run_sim, make_trace, tmp_path):
    calibration, judged = make_trace(n_tokens=50).path, make_trace(n_tokens=60).path
    wave = tmp_path / "wave.json"
    code, out, _ = run_sim("calibrate", "--trace", calibration, "--out", wave)
    assert code == 0
    assert "wrote" in out
    arguments = ["-p", "reasonalloc", "-b", "20", "--wave", wave]
    assert run_sim("replay", "--trace", judged, *arguments)[0] == 0
    code, _, err = run_sim("replay", "--trace", calibration, *arguments)
    assert code == 2
    assert "used to calibrate" in err


def break_manifest(path, **fields):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def corrupt(path):
    layer = path / "layer_001.safetensors"
    content = bytearray(layer.read_bytes())
    content[len(content) // 2] ^= 1
    layer.write_bytes(content)
    return "layer_001.safetensors"


def truncate(path):
    layer = path / "layer_001.safetensors"
    layer.write_bytes(layer.read_bytes()[:-10])
    return "layer_001.safetensors"


def half_write(path):
    (path / "manifest.json").unlink()
    return "manifest.json"


def wrong_version(path):
    break_manifest(path, version=2)
    return "version"


def bear_nan(path):
    """Put a NaN into a key and mend all digests, so that only the check of numbers can notice."""
    layer = path / "layer_000.safetensors"
    content = bytearray(layer.read_bytes())
    content[-2:] = np.array([np.nan], np.float16).tobytes()
    layer.write_bytes(content)
    reseal(path)
    return "layer_000.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [corrupt, truncate, half_write, wrong_version, bear_nan])
@pytest.mark.parametrize("verb", ["replay", "validate"])
def test_a_damaged_trace_is_one_line_and_exit_3(run_sim, trace_path, damage, verb):
    word = damage(trace_path)
    if verb == "replay":
        code, out, err = run_sim("replay", "--trace", trace_path, "-p", "rkv", "-b", "20")
        one_line(err, word)
        assert out == ""
    else:
        code, out, err = run_sim("trace", "validate", trace_path)
        assert word in out + err
    assert code == 3


def test_a_missing_trace_exits_3(run_sim, tmp_path):
    code, _, err = run_sim("replay", "--trace", tmp_path / "none*.kvtrace")
    assert code == 3
    one_line(err, "none*.kvtrace")


def test_policies_are_listed_and_shown(run_sim):
    code, out, _ = run_sim("policies", "list")
    assert code == 0
    for name in ("streamingllm", "rkv", "wave", "utility", "every-n", "reasonalloc"):
        assert name in out
        assert run_sim("policies", "show", name)[0] == 0
    code, _, err = run_sim("policies", "show", "nothing")
    assert code == 2
    one_line(err, "nothing")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_listings_keep_within_the_terminal(run_sim, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["list"], ["show", "reasonalloc"], ["show", "snapkv-paper"]):
        _, out, _ = run_sim("policies", *arguments)
        assert max(map(len, out.splitlines())) <= min(width, 110)


@pytest.mark.slow
def test_every_name_is_shown_with_a_meaning_for_every_parameter(run_sim):
    for name in {*SCORERS, *ALIASES, *LAYER_ALLOCATORS, *HEAD_ALLOCATORS, *TRIGGERS}:
        code, out, _ = run_sim("policies", "show", name, "--format", "json")
        assert code == 0
        for card in json.loads(out):
            assert card["summary"], card["name"]
            assert all(parameter["meaning"] for parameter in card["parameters"]), card["name"]


def test_show_tells_parts_values_needs_and_deviations(run_sim):
    _, out, _ = run_sim("policies", "show", "rkv+wave:alpha=0.3")
    out = " ".join(out.split())
    for words in (
        "scorer: rkv",
        "layer allocator: wave",
        "head allocator: uniform",
        "trigger: buffer-full",
        "alpha = 0.3 (default 0.1)",
        "needs: a wave of the model",
        "Observed queries; as many recent entries are protected.",
        "`slot_order=score,no_match=column0` reproduces the published code.",
    ):
        assert words in out
    _, out, _ = run_sim("policies", "show", "uniform")
    assert [line for line in out.splitlines() if ": uniform" in line] == [
        "layer allocator: uniform",
        "head allocator: uniform",
    ]
    assert "needs: values" in run_sim("policies", "show", "vatp")[1]
    _, out, _ = run_sim("policies", "show", "rkv-code")
    assert out.startswith("rkv-code = rkv:slot_order=score")
    assert "slot_order = score (default chronological)" in out


def test_lists_are_given_as_json_too(run_sim):
    code, out, _ = run_sim("policies", "list", "--format", "json")
    assert code == 0
    groups = json.loads(out)
    assert list(groups) == ["scorers", "layer allocators", "head allocators", "triggers", "aliases"]
    assert {entry["name"] for entry in groups["scorers"]} == set(SCORERS)
    code, _, err = run_sim("policies", "list", "--format", "csv")
    assert code == 2
    one_line(err, "csv", "text, json")


def test_interrupt_exits_130(run_sim, trace_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("simulator.cells.run_replay", interrupted)
    code, _, err = run_sim("replay", "--trace", trace_path)
    assert code == 130
    one_line(err, "run the same command again")


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['sim', '--help']\n"
        "from validate.cli import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'numba', 'polars', 'torch', 'transformers', 'rich.table'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "replay" in ended.stdout


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(trace_path):
    sim = shutil.which("sim", path=str(Path(sys.executable).parent))
    ended = subprocess.run(
        f"{sim} replay --trace {trace_path} -p rkv -b 20 --format csv | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ended.stderr
