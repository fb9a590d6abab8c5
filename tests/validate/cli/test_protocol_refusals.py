"""``sim validate protocol``: what is refused before the first text."""

from __future__ import annotations

import pytest
from protocols import decoded
from spies import NAME
from verb_runs import one_line


def test_no_text_is_decoded_before_all_benchmarks_are_read(protocol, tmp_path):
    code, out, err = protocol("--prompts", "second=/none.jsonl")
    assert (code, out) == (2, "")
    one_line(err, "benchmark 'second': its prompts '/none.jsonl' cannot be read")
    assert decoded(tmp_path) == []


def test_prompts_on_the_command_line_win(protocol, tmp_path, saved, config):
    lines = (saved / "problems.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(lines[1])
    path = config(f'prompts = "{saved / "problems.jsonl"}"\nmax_new_tokens = 8', "max_new_tokens = 8")
    code, out, _ = protocol(
        "--prompts", f"first={tmp_path / 'one.jsonl'}", "-p", "rkv", "-b", "30", path=path
    )
    assert code == 0
    assert "first, small: 1 problem," in out
    code, _, err = protocol("-b", 30, path=path)
    assert code == 2
    one_line(err, "benchmark 'first' has no prompts; allowed: --prompts first=FILE")


@pytest.mark.slow
def test_a_missing_wave_is_said_with_how_to_make_it_before_anything_is_decoded(
    protocol, tmp_path, config, saved
):
    path = config(f'wave = "{saved / "wave.json"}"', "")
    code, out, err = protocol(path=path)
    assert (code, out) == (4, "")
    one_line(
        err,
        f"{path}: policy 'reasonalloc' needs the wave of model '{NAME}'",
        f"sim record --model {saved / NAME} --prompts CALIBRATION.jsonl",
        "sim calibrate --trace runs/calibration --out wave.json; give it with --wave wave.json, or models",
    )
    assert not (tmp_path / "run").exists()
    assert protocol("--wave", saved / "wave.json", "-b", 30, "--limit", 1, path=path)[0] == 0
    code, _, err = protocol("--random-weights", "tiny")
    assert code == 4
    one_line(err, "sim record --random-weights tiny", "give it with --wave wave.json\n")
    code, _, err = protocol("--wave", "/none.json")
    assert code == 4
    one_line(err, "wave /none.json: cannot be read: No such file")


def test_a_cap_that_does_not_hold_the_buffer_is_refused_beforehand(protocol, tmp_path, config):
    code, _, err = protocol(path=config("budgets = [20, 30]", 'budgets = ["12!"]'))
    assert code == 5
    one_line(
        err, "benchmarks.first, policy 'rkv' at budget 12!", "adds 4", "protects 8; allowed: at least 13!"
    )
    assert decoded(tmp_path) == []


def test_a_budget_that_leaves_a_layer_nothing_is_refused_beforehand(protocol, tmp_path, config):
    path = config('"rkv", "reasonalloc"', '"random+pyramid:recent=0"')
    path.write_text(path.read_text().replace("budgets = [20, 30]", "budgets = [20, 1]"))
    code, out, err = protocol(path=path)
    assert (code, out) == (5, "")
    one_line(err, f"{path}: benchmarks.first, policy 'random+pyramid' at budget 1: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "reference", "--random-weights", "tiny"], "--model reference and --random-weights tiny"),
        (["--random-weights", "none"], "'none' are of no known shape"),
        (["--model", "./none"], "model './none' is not a folder here"),
        (["--dtype", "float8"], "dtype is 'float8'; allowed: auto, float32"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--prompts", "p.jsonl"], "--prompts is 'p.jsonl'; allowed: BENCHMARK=FILE, of first"),
        (["--prompts", "third=p.jsonl"], "--prompts is 'third=p.jsonl'"),
        (["-p", "snapkv"], "--policy snapkv is not in"),
        (["-b", "64"], "--budget 64 is not in"),
        (["--samples", 0], "--samples is 0; allowed: 1 or more"),
        (["--max-new-tokens", 0], "--max-new-tokens is 0"),
        (["--batch", 0], "--batch is 0"),
        (["--limit", 0], "--limit is 0"),
        (["--seed", -1], "--seed is -1"),
        (["--jobs", -1], "--jobs is -1"),
        (["--temperature", 1], "No such option: --temperature"),
        (["--buffer", 8], "No such option: --buffer"),
        (["--trace", "sample"], "No such option: --trace"),
        (["--configs", "c.json"], "No such option: --configs"),
        (["--format", "parquet"], "needs a file"),
    ],
)
def test_mistakes_are_refused_before_anything_is_decoded(protocol, tmp_path, options, words):
    code, out, err = protocol(*options)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


def test_more_samples_need_a_temperature(protocol, config):
    code, _, err = protocol("--samples", 3, path=config("temperature = 1.5\nsamples = 2", ""))
    assert code == 2
    one_line(err, "--samples is 3, and", "has no temperature")


def test_a_folder_is_needed(run_sim, config):
    code, _, err = run_sim("validate", "protocol", "--config", config())
    assert code == 2
    one_line(err, "Missing option '--out'")


def test_results_of_another_protocol_are_not_mixed(protocol, config, tmp_path):
    assert protocol("-p", "rkv", "-b", 30)[0] == 0
    before = decoded(tmp_path)
    code, _, err = protocol("-p", "rkv", path=config("temperature = 1.5", "temperature = 0.5"))
    assert code == 2
    one_line(err, "holds results of other settings: its live is", "allowed: another folder")
    assert decoded(tmp_path) == before
