"""``sim validate live``: what is refused, most of it before anything is decoded."""

from __future__ import annotations

import json
import sys

import pytest
from verb_runs import one_line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "sample"], "No such option: --trace"),
        (["--steps", "steps.parquet"], "No such option: --steps"),
        (["--config", "c.toml"], "No such option: --config"),
        (["--samples", 2], "--samples 2 is given without --temperature"),
        (["--top-p", 0.9], "--top-p is given without --temperature"),
        (["--temperature", 0], "temperature is 0.0; allowed: above 0"),
        (["--temperature", 1, "--top-p", 2], "top_p is 2.0"),
        (["--samples", 0], "--samples is 0; allowed: 1 or more"),
        (["--batch", 0], "--batch is 0"),
        (["--max-new-tokens", 0], "--max-new-tokens is 0"),
        (["--limit", 0], "limit is 0"),
        (["--stretch", 0.9], "--stretch is 0.9; allowed: 1 or more"),
        (["--jobs", -1], "--jobs is -1; allowed: 0"),
        (["--seed", -1], "--seed is -1; allowed: a whole number from 0"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--policy", "none"], "policy 'none'"),
        (["--budget", "0.1"], "bare fraction"),
        (["--report", "/none/report.html"], "--report /none/report.html: folder /none is missing"),
        (["--format", "xml"], "--format is 'xml'"),
        (["--format", "parquet"], "needs a file"),
        (
            ["--simulated", "/none.parquet"],
            "--simulated /none.parquet: cannot be read: No such file",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_decoded(live, tmp_path, options, words):
    code, out, err = live(*options)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not valid JSON"),
        (
            '{"policy": "rkv", "budget": "20"}',
            "the whole is {'policy': 'rkv', 'budget': '20'}; allowed: array",
        ),
        ("[]", "holds no configuration; allowed: one or more"),
        ('[{"policy": "rkv", "budget": "20"}, {"policy": "rkv"}]', "[1]: field 'budget' is missing"),
        ('["rkv"]', "[0] is 'rkv'; allowed: object"),
        ('[{"policy": "none", "budget": "20"}]', "policy 'none'"),
        ('[{"policy": "rkv", "budget": 0.2}]', "bare fraction"),
        ('[{"policy": "rkv", "budget": null}]', "[0].budget is None; allowed: int | float | str"),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(live, tmp_path, text, words):
    path = tmp_path / "configs.json"
    if text is not None:
        path.write_text(text)
    code, out, err = live("--configs", path)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--policy", "rkv"], ["--budget", "20"]])
def test_configurations_stand_instead_of_policies_and_budgets(live, tmp_path, option):
    (tmp_path / "configs.json").write_text('[{"policy": "rkv", "budget": "20"}]')
    code, _, err = live("--configs", tmp_path / "configs.json", *option)
    assert code == 2
    one_line(err, "--configs stands instead of --policy and --budget")


def test_problems_that_cannot_be_read_are_refused(live, tmp_path):
    code, out, err = live(prompts="/none.jsonl")
    assert (code, out) == (2, "")
    one_line(err, "prompts file /none.jsonl: cannot be read")
    assert not (tmp_path / "run").exists()


def test_problems_without_answers_are_refused(live, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "walk", "answer": "1", "family": "walk"}\n{"prompt": "walk"}\n')
    code, _, err = live(prompts=path)
    assert code == 2
    one_line(err, "line 2: no answer; a live run grades answers")
    assert not (tmp_path / "run").exists()


def test_words_that_the_tokenizer_does_not_know_are_refused(live, tmp_path):
    place = tmp_path / "asked.jsonl"
    place.write_text(json.dumps({"prompt": "What is 3 plus 4 ?", "answer": "7"}) + "\n")
    code, _, err = live("-p", "rkv", "-b", "20", prompts=place)
    assert code == 2
    one_line(
        err, f"{place}, line 1", "'What', 'is', 'plus' and 1 more", "such as 'walk', 'program', 'machine'"
    )


def test_mathematics_without_its_grader_is_refused(live, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "What is $1 + 1$?", "answer": "2"}\n')
    code, _, err = live(prompts=path)
    assert code == 2
    one_line(err, "pip install 'kvbudget[math]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--wave", "/none.json"], 4, "wave /none.json: cannot be read: No such file"),
        (["--dtype", "float8"], 2, "dtype is 'float8'"),
    ],
)
def test_what_only_a_process_notices_is_one_line_too(live, options, code, words):
    found, out, err = live("-p", "rkv", "-b", "20", *options)
    assert (found, out) == (code, "")
    one_line(err, words)


def test_a_missing_model_is_one_line(live):
    code, _, err = live("-p", "rkv", "-b", "20", model="./none")
    assert code == 2
    one_line(err, "model './none' is not a folder here")


def test_no_gpu_exits_6(live, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = live("--device", "cuda")
    assert code == 6
    one_line(err, "device is 'cuda'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing option '--prompts'"),
        (["--prompts", "p.jsonl"], "Missing option '--out'"),
        (["--out", "run"], "Missing option '--prompts'"),
    ],
)
def test_problems_and_a_folder_are_needed(run_sim, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_sim("validate", "live", *options)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--level", "shadow", "--trace", "sample"], ["--prompts", "p.jsonl"]])
def test_options_before_the_verb_are_told_which_verbs_there_are(run_sim, options):
    code, out, err = run_sim("validate", *options)
    assert (code, out) == (2, "")
    one_line(
        err,
        f"{options[0]} stands where a verb",
        "shadow, masked, forced, live, protocol, calibrate, bench, as in sim",
    )
