"""What the README shows runs as it stands there."""

import re
import sys

import numpy as np
import pytest
from places import ROOT

from simulator.cells import run_replay

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(words):
    (found,) = [block for block in BLOCKS if words in block]
    return found


def test_every_python_block_is_tested():
    assert len(BLOCKS) == 4


def test_the_api_examples_run(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    names = {"queries": rng.normal(size=(2, 8, 200, 16)), "keys": rng.normal(size=(2, 2, 200, 16))}
    exec(block_with("write_trace"), names)
    assert names["table"]["status"].to_list() == ["ok"] * 6
    exec(block_with("memory_over_time"), names)
    held, requests = names["held"], names["requests"]
    assert len(held) == requests[-1].completion
    alone = [outcome.held for outcome in names["outcomes"]]
    assert held[0] == alone[0][0]
    assert held[60] == alone[0][60] + alone[1][0]


def test_the_evicting_example_holds_what_it_says(capsys):
    from validate.problems.families import make_problem

    names = {"prompt": make_problem("walk", 1, 0).prompt}
    exec(block_with("EvictingCache"), names)
    per_entry = 2 * 32 * 4  # a key and a value of 32 float32 numbers
    assert capsys.readouterr().out.split() == [str(8 * 4 * (128 + 32) * per_entry)]
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] + 200


def test_the_example_policy_runs_composed(make_trace, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(block_with("class Outliers"))
    assert len(block_with("class Outliers").splitlines()) < 30
    trace = make_trace(n_layers=1, n_kv_heads=1, group_size=1, n_tokens=40, prompt_tokens=30)
    policy = f"{source}:Outliers+pyramid+utility:recent=2,buffer=4"
    result = run_replay([trace], [policy], [12], keep_retained=True)
    assert result.exit_code == 0
    keys = trace.keys(0)[0, :30].astype(np.float64)
    distances = np.linalg.norm(keys - keys.mean(axis=0), axis=-1)[:28]
    kept = result.retained.filter(compression=0)["position"].to_list()
    assert kept == sorted([*np.argsort(-distances)[:10].tolist(), 28, 29])


def test_the_sample_table_is_what_the_command_prints(capsys, monkeypatch):
    from validate.cli import main as cli

    command = "sim replay --trace sample --buffer 32 --budget 20%"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = re.search(rf"\$ {re.escape(command)}\n(.*?)```", README, re.DOTALL)[1].splitlines()
    ours, theirs = (
        [line.split() for line in lines if re.search(r"\d\.\d{4}", line)] for lines in (printed, shown)
    )
    assert len(ours) == len(theirs) == 8
    for mine, stated in zip(ours, theirs, strict=True):
        # Another processor may add in another order and settle a near-tie otherwise.
        values, expected = (
            [float(x) for x in row if re.fullmatch(r"\d\.\d{4}", x)] for row in (mine, stated)
        )
        assert values == pytest.approx(expected, abs=0.01)
