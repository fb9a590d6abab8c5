"""``sim validate protocol``: what is decoded, and what stands beside it."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
import torch
from places import ROOT
from protocols import decoded
from spies import InThisProcess
from verb_runs import PROBLEMS

from validate.eviction.decode import Completion
from validate.live import completions, matrix
from validate.models.shapes import SHAPES
from validate.problems.prompts import encode_prompt
from validate.protocol.file import read_protocol
from validate.protocol.published import SCHEMA
from validate.reasoner.tokenizer import build_tokenizer

SHIPPED = ROOT / "validate" / "configs" / "reasonalloc_paper.toml"


RIGHT = {"rkv": [1, 0, 1, 1, 0, 0], "reasonalloc": [1, 1, 1, 1, 0, 1], "fullkv": [1] * 6}


@pytest.fixture
def answering(monkeypatch):
    """Let every policy answer as RIGHT says, problem by problem and sample by sample."""
    tokenizer = build_tokenizer()
    problems = {tuple(encode_prompt(tokenizer, own.prompt)): i for i, own in enumerate(PROBLEMS)}
    texts = [encode_prompt(tokenizer, own.completion)[1:] for own in PROBLEMS]

    def decode(model, prompts, policy, *_, **__):
        found, seen = [], {}
        for prompt in prompts:
            number = problems[tuple(prompt)]
            sample = seen[number] = seen.get(number, -1) + 1
            right = RIGHT[policy.name][2 * number + sample]
            found.append(Completion(texts[number] if right else texts[number][:6], True, 4096, 2048.0))
        return found

    monkeypatch.setattr(completions, "decode", decode)


@pytest.mark.slow
def test_our_accuracy_stands_beside_the_published_one(protocol, answering, tmp_path):
    code, out, err = protocol("-o", tmp_path / "rows.json", "--report", tmp_path / "r.html")
    assert (code, out, err) == (0, "", f"sim: wrote {tmp_path / 'rows.json'}: 8 rows\n")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in rows] == [list(SCHEMA)] * 8
    found = {(row["benchmark"], row["policy"], row["budget_asked"]): row for row in rows}
    assert {key: own["accuracy"] for key, own in found.items()} == pytest.approx(
        {("first", "fullkv", None): 1, ("second", "fullkv", None): 1}
        | {("first", "rkv", 20): 1 / 2, ("first", "rkv", 30): 1 / 2, ("second", "rkv", 20): 1 / 2}
        | {(name, "reasonalloc", n): 5 / 6 for name, n in (("first", 20), ("first", 30), ("second", 20))}
    )
    rkv = found["first", "rkv", 20]
    assert (rkv["model"], rkv["n_problems"], rkv["n_samples"]) == ("small", 3, 2)
    assert (rkv["published"], rkv["note"]) == (0.4025, "the model is not stated")
    assert rkv["difference"] == pytest.approx(1 / 2 - 0.4025)
    assert rkv["difference_low"] == pytest.approx(rkv["low"] - 0.4025)
    assert rkv["difference_high"] == pytest.approx(rkv["high"] - 0.4025)
    accuracy = pl.read_csv(tmp_path / "run" / "small" / "first" / "accuracy.csv")
    (interval,) = accuracy.filter(policy="rkv", budget_asked=20).select("low", "high").rows()
    assert (rkv["low"], rkv["high"]) == pytest.approx(interval)
    assert rkv["low"] < 0.5 < rkv["high"]
    assert found["first", "fullkv", None]["difference"] == pytest.approx(0.1)
    # Another budget, and another model's number, are nobody's.
    assert found["first", "rkv", 30]["published"] is None
    assert found["second", "rkv", 20]["published"] is None
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Beside the published numbers" in page
    assert "a paper, table 2" in page
    assert "<td>40.25*</td><td>+9.75</td>" in page
    assert "* the model is not stated." in page


def test_the_table_has_a_dash_where_nothing_is_published(protocol, answering, tmp_path):
    code, out, err = protocol()
    assert (code, err) == (0, "")
    lines = [re.sub(" +", " ", line).strip() for line in out.splitlines()]
    assert "first, small: 3 problems, 2 texts each, pass@1 in percent" in lines
    assert any(re.match(r"full fullkv 100\.00 .* 90\.00 \+10\.00 ", line) for line in lines)
    assert any(re.match(r"20 rkv 50\.00 .* 40\.25\* \+9\.75 ", line) for line in lines)
    assert any(re.match(r"reasonalloc 83\.33 .* 50\.00\* \+33\.33 ", line) for line in lines)
    assert any(re.match(r"30 rkv 50\.00 \S+ to \S+ - - -$", line) for line in lines)
    assert lines[-2:] == ["* the model is not stated", "published: a paper, table 2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt"])
def test_the_comparison_is_written_to_a_file(protocol, answering, tmp_path, name):
    assert protocol("-o", tmp_path / name)[:2] == (0, "")
    kept = pl.read_csv(tmp_path / "run" / "comparison-small.csv")
    assert kept.columns == list(SCHEMA)
    if name == "rows.txt":
        assert "published: a paper, table 2" in (tmp_path / name).read_text()
    else:
        rows = (pl.read_csv if name == "rows.csv" else pl.read_parquet)(tmp_path / name)
        assert rows["difference"].to_list() == pytest.approx(kept["difference"].to_list())


def test_only_the_parameters_that_were_published_are_compared(protocol, answering, config):
    code, out, _ = protocol("--format", "json", path=config('"rkv", ', '"rkv", "rkv:alpha=0.9", '))
    assert code == 0
    found = [
        row["published"] for row in json.loads(out) if (row["policy"], row["budget_asked"]) == ("rkv", 20)
    ]
    assert found == [0.4025, None, None, None]  # two parameters in two benchmarks


@pytest.mark.slow
def test_a_run_is_one_folder_per_model_and_benchmark_and_goes_on(protocol, tmp_path, monkeypatch):
    code, out, err = protocol("-p", "rkv")
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    assert len(list((run / "small" / "first" / "batches").iterdir())) == 3 * (1 + 2)
    assert len(list((run / "small" / "second" / "batches").iterdir())) == 2 * (1 + 1)
    first = pl.read_parquet(run / "small" / "first" / "batches" / "rkv-20-*.parquet")
    # As long as the full cache may write, though that ended earlier.
    assert first["n_tokens"].max() == 8
    assert pl.read_parquet(run / "small" / "second" / "batches" / "*.parquet")["n_tokens"].max() == 6
    assert first["sample"].unique().sort().to_list() == [0, 1]
    assert (run / "small" / "first" / "accuracy.csv").is_file()
    settings = json.loads((run / "small" / "first" / "settings.json").read_text())
    assert settings["live"]["stretch"] is None
    assert settings["live"]["sampling"] == {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "seed": 0}
    # Nothing is left to do: no process starts. Another policy adds only its own.
    monkeypatch.setattr(matrix, "processes", None)
    assert protocol("-p", "rkv") == (0, out, "")
    monkeypatch.setattr(matrix, "processes", InThisProcess)
    before = decoded(tmp_path)
    assert protocol()[0] == 0
    assert {name.split("-")[0] for name in set(decoded(tmp_path)) - set(before)} == {"reasonalloc"}


def test_a_text_under_eviction_may_outgrow_its_full_cache_run(protocol, tmp_path, monkeypatch):
    decode, asked = completions.decode, []

    def noted(model, prompts, policy, entries, limits, **settings):
        asked.append((policy.name, limits))
        if policy.name == "fullkv":
            return [Completion([5, 6], True, 1, 1.0)] * len(prompts)
        return decode(model, prompts, policy, entries, limits, **settings)

    monkeypatch.setattr(completions, "decode", noted)
    assert protocol("-p", "rkv", "-b", 30)[0] == 0
    assert asked == [("fullkv", [8, 8]), ("rkv", [8, 8])] * 3


def test_a_part_is_run_and_the_table_says_what_is_not_the_protocol(protocol, tmp_path):
    options = ["--limit", 1, "--samples", 1, "--max-new-tokens", 5, "--batch", 3, "-p", "rkv", "-b", "30"]
    code, out, err = protocol(*options)
    assert (code, err) == (0, "")
    assert [name.split("-")[0] for name in decoded(tmp_path)] == ["fullkv", "rkv"]
    assert not (tmp_path / "run" / "small" / "second").exists()  # it has no budget of 30
    assert out.splitlines()[-3:] == [
        "not all problems: the first 1 of each benchmark",
        "not the file's protocol: samples 1 instead of 2",
        "not the file's protocol: max_new_tokens 5 instead of 8 in first",
    ]
    code, _, err = protocol(*options, "-o", tmp_path / "rows.csv")
    assert (code, err.splitlines()[1]) == (0, "sim: not all problems: the first 1 of each benchmark")


def test_batches_that_fail_leave_the_others(protocol, tmp_path, monkeypatch):
    decode = completions.decode

    def failing(model, prompts, policy, *arguments, **settings):
        if policy.name == "reasonalloc":
            raise torch.OutOfMemoryError
        return decode(model, prompts, policy, *arguments, **settings)

    monkeypatch.setattr(completions, "decode", failing)
    code, out, err = protocol("-b", 20)
    assert code == 6
    assert "rkv" in out
    assert "reasonalloc" not in out
    assert err.splitlines()[-1] == "sim: 5 batches failed, the others are written"


def test_random_weights_take_the_place_of_a_model(protocol, tmp_path):
    code, out, err = protocol("--random-weights", "tiny", "-p", "rkv", "-b", 30, "--limit", 1)
    assert (code, err) == (0, "")
    assert "first, random:tiny: 1 problem," in out
    assert out.splitlines()[-1].startswith(
        "random:tiny: random weights of the shape tiny; its texts and answers"
    )
    assert (tmp_path / "run" / "random-tiny" / "first" / "settings.json").is_file()


@pytest.mark.slow
def test_the_shipped_protocol_runs_beside_the_papers_numbers(protocol, run_sim, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "R1-Llama-8B", SHAPES["tiny"])
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"unique_id": "a/1", "problem": "What is $1 + 1$?", "answer": "2"}\n')
    weights = ["--random-weights", "R1-Llama-8B"]
    recorded = ["--prompts", problems, "--out", tmp_path / "calibration", "--device", "cpu"]
    assert run_sim("record", *weights, *recorded, "--max-new-tokens", 5)[0] == 0
    wave = tmp_path / "wave.json"
    assert run_sim("calibrate", "--trace", tmp_path / "calibration", "--out", wave)[0] == 0
    given = ["--prompts", f"math-500={problems}", "--prompts", f"aime-2024={problems}", "--wave", wave]
    code, out, err = protocol(
        *weights, *given, "--max-new-tokens", 5, "--samples", 2, "--format", "json", path=SHIPPED
    )
    assert code == 0
    assert err.splitlines()[-1].startswith("sim: random:R1-Llama-8B: random weights")
    rows = json.loads(out)
    assert len(rows) == (1 + 3 * 6) + (1 + 5 * 6)
    published = {
        (row["benchmark"], row["budget_asked"], row["policy"]): row["published"]
        for row in rows
        if row["published"] is not None
    }
    assert len(published) == len(read_protocol(SHIPPED).published)
    assert published["math-500", None, "fullkv"] == pytest.approx(0.892)
    assert published["math-500", 512, "pyramid-rkv"] == pytest.approx(0.794)
    assert published["aime-2024", 2560, "reasonalloc"] == pytest.approx(0.5334)
