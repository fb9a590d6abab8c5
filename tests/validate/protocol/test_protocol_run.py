"""A protocol run as a user runs it: what is refused beforehand, what is decoded, what stands beside it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from io import BytesIO

import polars as pl
import pytest
import torch
from places import ROOT
from spies import NAME, InThisProcess, tiny_waves
from tiny_models import tiny_model

from simulator.policies.wave import known_waves
from traces.errors import MissingDataError, UserError
from validate.cli import main as cli
from validate.eviction.decode import Completion
from validate.live import completions, matrix
from validate.models.load import know_model, load_model
from validate.models.shapes import SHAPES
from validate.problems.families import make_problem
from validate.problems.prompts import encode_prompt, read_prompts
from validate.protocol.file import read_protocol
from validate.protocol.options import Asked, choose_model
from validate.protocol.preflight import require_runnable
from validate.protocol.prompts import prepare_prompts
from validate.protocol.published import SCHEMA, beside_published
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

SHIPPED = ROOT / "validate" / "configs" / "reasonalloc_paper.toml"
PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(3)]
CONFIG = """
source = "a paper, table 2"
model = "small"
policies = ["fullkv", "rkv", "reasonalloc"]

[parameters]
buffer = 4

[decoding]
temperature = 1.5
samples = 2

[models.small]
id = "{model}"
wave = "{wave}"

[models.other]
id = "org/other"

[benchmarks.first]
prompts = "{problems}"
max_new_tokens = 8
budgets = [20, 30]

[benchmarks.second]
prompts = "{problems}"
max_new_tokens = 6
budgets = [20]
batch = 2

[[published]]
model = "small"
benchmark = "first"
budget = "full"
accuracy = {{ fullkv = 90 }}

[[published]]
model = "small"
benchmark = "first"
budget = 20
accuracy = {{ rkv = 40.25, reasonalloc = 50 }}
note = "the model is not stated"

[[published]]
model = "other"
benchmark = "second"
budget = 20
accuracy = {{ rkv = 77.77 }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model, its wave and problems."""
    folder = tmp_path_factory.mktemp("protocol")
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=2).save_pretrained(folder / NAME)
    build_tokenizer().save_pretrained(folder / NAME)
    replace(tiny_waves()[NAME], model_revision="").write(folder / "wave.json")
    rows = [{name: asdict(own)[name] for name in ("id", "family", "prompt", "answer")} for own in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """Write the protocol, perhaps with one part replaced; give its path."""

    def write(old="", new=""):
        places = {"model": folder / NAME, "wave": folder / "wave.json", "problems": folder / "problems.jsonl"}
        text = CONFIG.format(**places)
        assert old in text
        (tmp_path / "protocol.toml").write_text(text.replace(old, new) if old else text)
        return tmp_path / "protocol.toml"

    return write


@pytest.fixture
def sim(monkeypatch, capsys, tmp_path, config):
    """Run ``sim validate --config`` in this process; give exit code, standard output and standard error."""
    monkeypatch.setattr(matrix, "processes", InThisProcess)
    monkeypatch.setattr(matrix, "_worker", {})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)

    def run(*options, path=None):
        given = ["--config", path or config(), "--out", tmp_path / "run", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["sim", "validate", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def one_line(err, *words):
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("sim: ")
    for word in words:
        assert str(word) in err


def decoded(tmp_path):
    return sorted(path.name for path in (tmp_path / "run").rglob("batches/*.parquet"))


# What a run tells -----------------------------------------------------------------------------------------


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


def test_our_accuracy_stands_beside_the_published_one(sim, answering, tmp_path):
    code, out, err = sim("-o", tmp_path / "rows.json", "--report", tmp_path / "r.html")
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


def test_the_table_has_a_dash_where_nothing_is_published(sim, answering, tmp_path):
    code, out, err = sim()
    assert (code, err) == (0, "")
    lines = [re.sub(" +", " ", line).strip() for line in out.splitlines()]
    assert "first, small: 3 problems, 2 texts each, pass@1 in percent" in lines
    assert any(re.match(r"full fullkv 100\.00 .* 90\.00 \+10\.00 ", line) for line in lines)
    assert any(re.match(r"20 rkv 50\.00 .* 40\.25\* \+9\.75 ", line) for line in lines)
    assert any(re.match(r"reasonalloc 83\.33 .* 50\.00\* \+33\.33 ", line) for line in lines)
    assert any(re.match(r"30 rkv 50\.00 \S+ to \S+ - - -$", line) for line in lines)
    assert lines[-2:] == ["* the model is not stated", "published: a paper, table 2"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt"])
def test_the_comparison_is_written_to_a_file(sim, answering, tmp_path, name):
    assert sim("-o", tmp_path / name)[:2] == (0, "")
    kept = pl.read_csv(tmp_path / "run" / "comparison-small.csv")
    assert kept.columns == list(SCHEMA)
    if name == "rows.txt":
        assert "published: a paper, table 2" in (tmp_path / name).read_text()
    else:
        rows = (pl.read_csv if name == "rows.csv" else pl.read_parquet)(tmp_path / name)
        assert rows["difference"].to_list() == pytest.approx(kept["difference"].to_list())


def test_only_the_parameters_that_were_published_are_compared(sim, answering, config):
    code, out, _ = sim("--format", "json", path=config('"rkv", ', '"rkv", "rkv:alpha=0.9", '))
    assert code == 0
    found = [
        row["published"] for row in json.loads(out) if (row["policy"], row["budget_asked"]) == ("rkv", 20)
    ]
    assert found == [0.4025, None, None, None]  # two parameters in two benchmarks


def test_a_share_of_the_texts_is_compared_with_a_share():
    rows = pl.DataFrame(
        {"problem": ["a", "a"], "family": ["x", "y"], "sample": [0, 1], "policy": ["rkv"] * 2}
        | {"policy_params": ["{}"] * 2, "budget_asked": [5.0] * 2, "budget_unit": ["entries"] * 2}
        | {"budget_kind": ["kept"] * 2}
        | {"right": [True, False], "answer": ["1", None], "ended": [True] * 2, "loop_period": [None] * 2}
        | {"n_tokens": [3] * 2, "diverged_at": [None] * 2, "bytes_peak": [1] * 2, "bytes_mean": [1.0] * 2}
    )
    (row,) = beside_published(rows, "m", "b", []).to_dicts()
    assert (row["accuracy"], row["n_problems"], row["n_samples"], row["difference"]) == (0.5, 1, 2, None)


# What is decoded ------------------------------------------------------------------------------------------


def test_a_run_is_one_folder_per_model_and_benchmark_and_goes_on(sim, tmp_path, monkeypatch):
    code, out, err = sim("-p", "rkv")
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
    assert sim("-p", "rkv") == (0, out, "")
    monkeypatch.setattr(matrix, "processes", InThisProcess)
    before = decoded(tmp_path)
    assert sim()[0] == 0
    assert {name.split("-")[0] for name in set(decoded(tmp_path)) - set(before)} == {"reasonalloc"}


def test_a_text_under_eviction_may_outgrow_its_full_cache_run(sim, tmp_path, monkeypatch):
    decode, asked = completions.decode, []

    def noted(model, prompts, policy, entries, limits, **settings):
        asked.append((policy.name, limits))
        if policy.name == "fullkv":
            return [Completion([5, 6], True, 1, 1.0)] * len(prompts)
        return decode(model, prompts, policy, entries, limits, **settings)

    monkeypatch.setattr(completions, "decode", noted)
    assert sim("-p", "rkv", "-b", 30)[0] == 0
    assert asked == [("fullkv", [8, 8]), ("rkv", [8, 8])] * 3


def test_a_part_is_run_and_the_table_says_what_is_not_the_protocol(sim, tmp_path):
    options = ["--limit", 1, "--samples", 1, "--max-new-tokens", 5, "--batch", 3, "-p", "rkv", "-b", "30"]
    code, out, err = sim(*options)
    assert (code, err) == (0, "")
    assert [name.split("-")[0] for name in decoded(tmp_path)] == ["fullkv", "rkv"]
    assert not (tmp_path / "run" / "small" / "second").exists()  # it has no budget of 30
    assert out.splitlines()[-3:] == [
        "not all problems: the first 1 of each benchmark",
        "not the file's protocol: samples 1 instead of 2",
        "not the file's protocol: max_new_tokens 5 instead of 8 in first",
    ]
    code, _, err = sim(*options, "-o", tmp_path / "rows.csv")
    assert (code, err.splitlines()[1]) == (0, "sim: not all problems: the first 1 of each benchmark")


def test_batches_that_fail_leave_the_others(sim, tmp_path, monkeypatch):
    decode = completions.decode

    def failing(model, prompts, policy, *arguments, **settings):
        if policy.name == "reasonalloc":
            raise torch.OutOfMemoryError
        return decode(model, prompts, policy, *arguments, **settings)

    monkeypatch.setattr(completions, "decode", failing)
    code, out, err = sim("-b", 20)
    assert code == 6
    assert "rkv" in out
    assert "reasonalloc" not in out
    assert err.splitlines()[-1] == "sim: 5 batches failed, the others are written"


def test_random_weights_take_the_place_of_a_model(sim, tmp_path):
    code, out, err = sim("--random-weights", "tiny", "-p", "rkv", "-b", 30, "--limit", 1)
    assert (code, err) == (0, "")
    assert "first, random:tiny: 1 problem," in out
    assert out.splitlines()[-1].startswith(
        "random:tiny: random weights of the shape tiny; its texts and answers"
    )
    assert (tmp_path / "run" / "random-tiny" / "first" / "settings.json").is_file()


def test_the_shipped_protocol_runs_beside_the_papers_numbers(sim, run_sim, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "R1-Llama-8B", SHAPES["tiny"])
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"unique_id": "a/1", "problem": "What is $1 + 1$?", "answer": "2"}\n')
    weights = ["--random-weights", "R1-Llama-8B"]
    recorded = ["--prompts", problems, "--out", tmp_path / "calibration", "--device", "cpu"]
    assert run_sim("record", *weights, *recorded, "--max-new-tokens", 5)[0] == 0
    wave = tmp_path / "wave.json"
    assert run_sim("calibrate", "--trace", tmp_path / "calibration", "--out", wave)[0] == 0
    given = ["--prompts", f"math-500={problems}", "--prompts", f"aime-2024={problems}", "--wave", wave]
    code, out, err = sim(
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


# Which model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "load", "label", "stands_for"),
    [
        (None, "{model}", "small", "small"),
        ("small", "{model}", "small", "small"),
        ("other", "org/other", "other", "other"),
        ("org/other", "org/other", "other", "other"),
        ("/data/other/", "/data/other/", "other", "other"),
        ("other=/data/x", "/data/x", "other", "other"),
        ("third=/data/x", "third=/data/x", "third=/data/x", None),
        ("org/third", "org/third", "org/third", None),
        ("random:tiny", "random:tiny", "random:tiny", None),
        ("random:small", "random:small", "random:small", "small"),
    ],
)
def test_a_model_stands_for_one_of_the_file(config, folder, asked, load, label, stands_for):
    found = choose_model(read_protocol(config()), asked)
    assert (found.load, found.label, found.stands_for) == (
        load.format(model=folder / NAME),
        label,
        stands_for,
    )


def test_folders_have_names_that_file_systems_take(config):
    assert choose_model(read_protocol(config()), "org/third").folder == "org-third"
    assert choose_model(read_protocol(config()), "random:tiny").folder == "random-tiny"


@pytest.mark.parametrize("name", ["{folder}", "reference", "random:tiny"])
def test_a_model_is_known_by_the_name_that_loading_gives_it(folder, name):
    name = name.format(folder=folder / NAME)
    known, loaded = know_model(name), load_model(name, "float32", "cpu")
    assert (known.name, known.revision) == (loaded.name, loaded.revision)
    assert known.config.num_hidden_layers == loaded.model.config.num_hidden_layers


# Prompts --------------------------------------------------------------------------------------------------


def prepared(source, tmp_path, template="{problem}"):
    return prepare_prompts("math", str(source), template, tmp_path / "prompts")


def test_problems_are_asked_as_the_template_says(tmp_path):
    row = {"problem": r"What is $\frac{1}{2}$ of {problem}?", "answer": "½", "unique_id": "test/a.json"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,) = read_prompts(prepared(tmp_path / "p.jsonl", tmp_path, "Solve: {problem}\nin \\boxed{}."))
    assert found.text == "Solve: " + row["problem"] + "\nin \\boxed{}."
    assert (found.id, found.answer, found.family) == ("test/a.json", "½", "math")


def test_problems_of_a_family_keep_it(folder, tmp_path):
    found = read_prompts(prepared(folder / "problems.jsonl", tmp_path))
    assert [(own.family, own.text) for own in found] == [("walk", own.prompt) for own in PROBLEMS]


def test_a_url_is_read_once_and_kept(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    rows = pl.DataFrame({"id": [60, 61], "problem": ["one", "two"], "answer": ["033", "204"], "year": [1, 2]})
    buffer = BytesIO()
    rows.write_parquet(buffer)
    fsspec.filesystem("memory").pipe("/aime/train.parquet", buffer.getvalue())
    url = "memory://aime/train.parquet"
    expected = [("60", "one", "033"), ("61", "two", "204")]
    assert [(own.id, own.text, own.answer) for own in read_prompts(prepared(url, tmp_path))] == expected
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert [(own.id, own.text, own.answer) for own in read_prompts(prepared(url, tmp_path))] == expected
    with pytest.raises(UserError, match=r"needs fsspec, .* pip install 'kvbudget\[remote\]'"):
        prepared("memory://aime/other.parquet", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "none.jsonl",
            "benchmark 'math': its prompts 'none.jsonl' cannot be read: No such file",
        ),
        ("memory://none/p.jsonl", "memory://none/p.jsonl cannot be read: FileNotFoundError"),
        ("nothing://p.jsonl", "nothing://p.jsonl cannot be read: ValueError: Protocol not known"),
        ("bad.parquet", "bad.parquet cannot be read: no Parquet"),
        ("bare.jsonl", "bare.jsonl, line 1: no answer"),
        ("text.jsonl", "text.jsonl, line 1: not valid JSON"),
    ],
)
def test_problems_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, source, words):
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bare.jsonl").write_text('{"problem": "one"}\n')
    (tmp_path / "text.jsonl").write_text("one\n")
    with pytest.raises(UserError) as refused:
        prepared(source, tmp_path)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    if "cannot be read" in words:
        assert "allowed: --prompts math=FILE.jsonl" in str(refused.value)


def test_no_text_is_decoded_before_all_benchmarks_are_read(sim, tmp_path):
    code, out, err = sim("--prompts", "second=/none.jsonl")
    assert (code, out) == (2, "")
    one_line(err, "benchmark 'second': its prompts '/none.jsonl' cannot be read")
    assert decoded(tmp_path) == []


def test_prompts_on_the_command_line_win(sim, tmp_path, folder, config):
    lines = (folder / "problems.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(lines[1])
    path = config(f'prompts = "{folder / "problems.jsonl"}"\nmax_new_tokens = 8', "max_new_tokens = 8")
    code, out, _ = sim("--prompts", f"first={tmp_path / 'one.jsonl'}", "-p", "rkv", "-b", "30", path=path)
    assert code == 0
    assert "first, small: 1 problem," in out
    code, _, err = sim("-b", 30, path=path)
    assert code == 2
    one_line(err, "benchmark 'first' has no prompts; allowed: --prompts first=FILE")


# What is refused ------------------------------------------------------------------------------------------


def test_a_missing_wave_is_said_with_how_to_make_it_before_anything_is_decoded(sim, tmp_path, config, folder):
    path = config(f'wave = "{folder / "wave.json"}"', "")
    code, out, err = sim(path=path)
    assert (code, out) == (4, "")
    one_line(
        err,
        f"{path}: policy 'reasonalloc' needs the wave of model '{NAME}'",
        f"sim record --model {folder / NAME} --prompts CALIBRATION.jsonl",
        "sim calibrate --trace runs/calibration --out wave.json; give it with --wave wave.json, or models",
    )
    assert not (tmp_path / "run").exists()
    assert sim("--wave", folder / "wave.json", "-b", 30, "--limit", 1, path=path)[0] == 0
    code, _, err = sim("--random-weights", "tiny")
    assert code == 4
    one_line(err, "sim record --random-weights tiny", "give it with --wave wave.json\n")
    code, _, err = sim("--wave", "/none.json")
    assert code == 4
    one_line(err, "wave /none.json: cannot be read: No such file")


def test_a_wave_of_another_shape_is_refused_beforehand(config, folder, tmp_path):
    protocol, asked = read_protocol(config()), Asked(config(), tmp_path)
    model = choose_model(protocol, None)
    waves = known_waves([folder / "wave.json"])
    require_runnable(protocol, model, asked, waves)
    wave = waves[NAME]
    longer = replace(wave, demand=(*wave.demand, 2.0), head_demand=(*wave.head_demand, (1.0, 1.0)))
    with pytest.raises(MissingDataError, match=r"policy 'reasonalloc' at budget 20: .* has 3 layers"):
        require_runnable(protocol, model, asked, waves | {NAME: longer})
    other = replace(wave, model_revision="other")
    with pytest.raises(MissingDataError, match="is of revision other"):
        require_runnable(protocol, model, asked, waves | {NAME: other})


def test_a_cap_that_does_not_hold_the_buffer_is_refused_beforehand(sim, tmp_path, config):
    code, _, err = sim(path=config("budgets = [20, 30]", 'budgets = ["12!"]'))
    assert code == 5
    one_line(
        err, "benchmarks.first, policy 'rkv' at budget 12!", "adds 4", "protects 8; allowed: at least 13!"
    )
    assert decoded(tmp_path) == []


def test_a_budget_that_leaves_a_layer_nothing_is_refused_beforehand(sim, tmp_path, config):
    path = config('"rkv", "reasonalloc"', '"random+pyramid:recent=0"')
    path.write_text(path.read_text().replace("budgets = [20, 30]", "budgets = [20, 1]"))
    code, out, err = sim(path=path)
    assert (code, out) == (5, "")
    one_line(err, f"{path}: benchmarks.first, policy 'random+pyramid' at budget 1: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "reference", "--random-weights", "tiny"], "--model reference and --random-weights tiny"),
        (["--random-weights", "none"], "'none' are of no known shape"),
        (["--model", "./none"], "model './none' is not a folder here"),
        (["--dtype", "float8"], "dtype is 'float8'; allowed: auto, float32"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--prompts", "p.jsonl"], "--prompts is 'p.jsonl'; allowed with --config: BENCHMARK=FILE, of first"),
        (["--prompts", "third=p.jsonl"], "--prompts is 'third=p.jsonl'"),
        (["-p", "snapkv"], "--policy snapkv is not in"),
        (["-b", "64"], "--budget 64 is not in"),
        (["--samples", 0], "--samples is 0; allowed: 1 or more"),
        (["--max-new-tokens", 0], "--max-new-tokens is 0"),
        (["--batch", 0], "--batch is 0"),
        (["--limit", 0], "--limit is 0"),
        (["--seed", -1], "--seed is -1"),
        (["--jobs", -1], "--jobs is -1"),
        (["--temperature", 1], "--temperature does not go with --config"),
        (["--buffer", 8], "--buffer does not go with --config"),
        (["--trace", "sample"], "--trace does not go with --config"),
        (["--level", "forced"], "--level does not go with --config"),
        (["--configs", "c.json"], "--configs does not go with --config"),
        (["--format", "parquet"], "needs a file"),
    ],
)
def test_mistakes_are_refused_before_anything_is_decoded(sim, tmp_path, options, words):
    code, out, err = sim(*options)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


def test_more_samples_need_a_temperature(sim, config):
    code, _, err = sim("--samples", 3, path=config("temperature = 1.5\nsamples = 2", ""))
    assert code == 2
    one_line(err, "--samples is 3, and", "has no temperature")


def test_a_folder_is_needed(run_sim, config):
    code, _, err = run_sim("validate", "--config", config())
    assert code == 2
    one_line(err, "--config needs --out FOLDER")


def test_results_of_another_protocol_are_not_mixed(sim, config, tmp_path):
    assert sim("-p", "rkv", "-b", 30)[0] == 0
    before = decoded(tmp_path)
    code, _, err = sim("-p", "rkv", path=config("temperature = 1.5", "temperature = 0.5"))
    assert code == 2
    one_line(err, "holds results of other settings: its live is", "allowed: another folder")
    assert decoded(tmp_path) == before
