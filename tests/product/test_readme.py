"""What the pages show runs as it stands there."""

import re
import tomllib

import numpy as np
import pytest
from page_examples import EXAMPLES, TYPED
from places import GOLDEN

from simulator.cells import run_replay
from simulator.sweep.spec import read_spec

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
# A word of each example in Python; the tests below run them.
RUN = ("write_trace", "memory_over_time", "EvictingCache", "class Outliers", "savez_compressed")


def blocks(language, words=""):
    return [each.text for each in EXAMPLES if each.language == language and words in each.text]


def block_with(words):
    """Give the Python example with some words, the same wherever it is shown."""
    (found,) = set(blocks("python", words))
    return found


def test_every_python_example_is_run():
    assert len(set(blocks("python"))) == len(RUN)
    assert all(any(words in text for words in RUN) for text in blocks("python"))


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


@pytest.mark.slow
def test_the_evicting_example_holds_what_it_says(capsys):
    from validate.problems.families import make_problem

    names = {"prompt": make_problem("walk", 1, 0).prompt}
    exec(block_with("EvictingCache"), names)
    per_entry = 2 * 32 * 4  # a key and a value of 32 float32 numbers
    assert capsys.readouterr().out.split() == [str(8 * 4 * (128 + 32) * per_entry)]
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] + 200


@pytest.mark.slow
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


def test_the_golden_vector_is_cut_as_its_page_says(tmp_path, monkeypatch):
    name = "snapkv-seed13-b128-w8-k7-lam0.0-first160-step128.npz"
    stored = np.load(GOLDEN / name)
    whole = {key: np.repeat(stored[key], 2, axis=0) for key in stored.files if key != "compaction_lengths"}
    whole = {key: np.pad(x, [(0, 0), (0, 9), (0, 0)]) if x.ndim == 3 else x for key, x in whole.items()}
    whole["compaction_lengths"] = np.append(stored["compaction_lengths"], [544, 672])
    (tmp_path / "whole").mkdir()
    np.savez(tmp_path / "whole" / name, **whole)
    monkeypatch.chdir(tmp_path)
    exec(block_with("savez_compressed"), {})
    cut = np.load(tmp_path / name)
    assert set(cut.files) == set(stored.files)
    assert all(np.array_equal(cut[key][:1], stored[key][:1]) for key in stored.files)
    assert all(cut[key].shape == stored[key].shape for key in stored.files)


@pytest.mark.parametrize("text", blocks("toml"))
def test_a_sweep_of_a_page_is_read(text, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    settings = read_spec(path).settings
    asked = tomllib.loads(text)
    assert {setting.policy.name for setting in settings} == {
        *asked["policies"],
        *(own["policy"] for own in asked["grid"]),
    }


def told(lines):
    """Give words and numbers of what a command prints, apart; lines of a table are as wide as they are."""
    text = " ".join(line for line in lines if set(line) - set(" ─"))
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    return NUMBER.sub("0", text).split(), numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [each for each in TYPED if each.printed and not each.excuse],
    ids=lambda command: command.name,
)
def test_a_command_prints_what_its_page_shows(command, run_sim):
    code, out, _ = run_sim(*command.words[1:])
    assert code == 0
    words, numbers = told(out.splitlines())
    shown_words, shown_numbers = told(command.printed)
    assert words == shown_words
    # Another processor may add in another order and settle a near-tie otherwise.
    assert numbers == pytest.approx(shown_numbers, abs=0.01, rel=0.01)


def test_outputs_are_compared():
    assert sum(1 for each in TYPED if each.printed and not each.excuse) >= 4
