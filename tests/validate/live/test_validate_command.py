"""The verb that evicts for real, as a user meets it: tables, files, one-line errors, exit codes."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import asdict
from functools import partial

import polars as pl
import pytest
import torch
from spies import NAME, InThisProcess
from tiny_models import tiny_model

import validate.live
from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from simulator.results.tables import GROUP
from traces.store import open_trace
from validate.cli import main as cli
from validate.eviction.decode import Completion
from validate.levels.runs import Shadow, forced_steps, run_forced, run_shadow
from validate.live import completions, matrix
from validate.live.accuracy import accuracy_table
from validate.live.completions import ROW_SCHEMA
from validate.live.fidelity import LIVE_HALF, METRICS, best_metric, fidelity_table
from validate.models.load import load_model
from validate.problems.families import make_problem
from validate.problems.prompts import encode_prompt
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.decode import record_decode

PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model, problems, a trace of each, and a replay of the traces."""
    folder = tmp_path_factory.mktemp("validate")
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=2).save_pretrained(folder / NAME)
    build_tokenizer().save_pretrained(folder / NAME)
    rows = [{name: asdict(own)[name] for name in ("id", "family", "prompt", "answer")} for own in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer, name, revision = load_model(str(folder / NAME), "float32", "cpu")
    for problem in PROBLEMS[:2]:
        record_decode(
            model,
            tokenizer,
            encode_prompt(tokenizer, problem.prompt),
            folder / f"{problem.id.replace('/', '-')}.kvtrace",
            max_new_tokens=30,
            model_name=name,
            model_revision=revision,
            task={"id": problem.id, "family": "walk", "answer": problem.answer},
        )
    return folder


@pytest.fixture(scope="module")
def trace(folder):
    return open_trace(sorted(folder.glob("*.kvtrace"))[0])


@pytest.fixture
def run_sim(monkeypatch, capsys):
    """Run ``sim validate`` in this process; give exit code, standard output and standard error."""
    monkeypatch.setattr(matrix, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(matrix, "_worker", {})
    # A process that decodes sets these for itself.
    n_threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("validate.live.fidelity.fidelity_table", partial(fidelity_table, resamples=20))

    def run(*arguments, verb="validate"):
        monkeypatch.setattr(sys, "argv", ["sim", verb, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield run
    torch.set_num_threads(n_threads)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture
def live(run_sim, folder, tmp_path):
    """Run the live level on the tiny model."""

    def run(*options, prompts=folder / "problems.jsonl", n=8, model=folder / NAME, out=tmp_path / "run"):
        base = ["--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", n]
        return run_sim(*base, "--device", "cpu", "--buffer", 4, *options)

    return run


@pytest.fixture
def level(run_sim, folder, trace):
    """Run the shadow or forced level on one trace of the tiny model."""

    def run(name, *options, budget="20"):
        base = ["--level", name, "--model", folder / NAME, "--trace", trace.path, "--device", "cpu"]
        return run_sim(*base, "--buffer", 6, "-b", budget, *options)

    return run


def one_line(err, *words):
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("sim: ")
    for word in words:
        assert str(word) in err


# Shadow and forced ---------------------------------------------------------------------------------------


def test_the_shadow_level_counts_decisions_and_mismatches(level, folder, trace):
    code, out, err = level("shadow", "-p", "rkv,random", "--format", "json", "--seed", 1)
    assert (code, err) == (0, "")
    model = load_model(str(folder / NAME), "float32", "cpu").model
    expected = run_shadow(model, trace, parse_policy("random", buffer=6), 20, seed=1)
    rkv, random = json.loads(out)
    assert rkv["policy"] == "rkv"
    assert random == {
        "trace_id": trace.trace_id,
        "trace": trace.path.name,
        "policy": "random",
        "policy_params": parse_policy("random", buffer=6).parameters_json,
        "budget_asked": 20.0,
        "budget_unit": "entries",
        "budget_kind": "kept",
        "decisions": len(expected.expected),
        "mismatches": 0,
        "keys_equal": True,
    }
    assert random["decisions"] >= 2 * 2 * 4


@pytest.mark.parametrize("name", ["shadow", "forced"])
def test_a_cap_leaves_room_for_the_buffer_at_either_level(level, name):
    code, out, err = level(name, "-p", "rkv", "--format", "json", budget="26!,20")
    assert (code, err) == (0, "")
    capped, kept = json.loads(out)
    assert [capped[name] for name in GROUP[2:]] == [26.0, "entries", "peak"]
    assert [kept[name] for name in GROUP[2:]] == [20.0, "entries", "kept"]
    measured = [name for name in kept if name not in GROUP]
    assert [capped[name] for name in measured] == [kept[name] for name in measured]
    assert re.search(r"rkv +26! ", level(name, "-p", "rkv", budget="26!")[1])


@pytest.mark.parametrize(
    "option",
    [
        "--limit",
        "--samples",
        "--temperature",
        "--top-p",
        "--max-new-tokens",
        "--stretch",
        "--batch",
        "--jobs",
    ],
)
def test_what_a_level_does_not_use_is_refused(level, option):
    code, _, err = level("shadow", "-p", "rkv", option, 1)
    assert code == 2
    one_line(err, f"{option} goes with --level live; --level shadow takes --trace")


@pytest.mark.parametrize("name", ["shadow", "forced"])
def test_a_level_with_an_infeasible_budget_ends_as_a_replay_does(level, name):
    assert level(name, "-p", "rkv", budget="3")[0] == 5
    assert level(name, "-p", "rkv", budget="3,20")[0] == 1


def test_a_live_run_with_infeasible_budgets_ends_as_a_replay_does(live):
    code, out, err = live("-p", "rkv", "-b", "3")
    assert code == 5
    assert "fullkv" in out
    assert err.splitlines()[-1] == "sim: all batches failed"
    for options in (("-p", "rkv", "-b", "3,20"), ("-p", "rkv,fullkv", "-b", "3")):
        code, _, err = live(*options)
        assert code == 1
        assert err.splitlines()[-1].endswith("failed, the others are written")


def test_words_that_the_tokenizer_does_not_know_are_refused(live, tmp_path):
    place = tmp_path / "asked.jsonl"
    place.write_text(json.dumps({"prompt": "What is 3 plus 4 ?", "answer": "7"}) + "\n")
    code, _, err = live("-p", "rkv", "-b", "20", prompts=place)
    assert code == 2
    one_line(
        err, f"{place}, line 1", "'What', 'is', 'plus' and 1 more", "such as 'walk', 'program', 'machine'"
    )


def test_a_mismatch_ends_with_exit_code_1(level, monkeypatch):
    monkeypatch.setattr(Shadow, "mismatches", property(lambda self: self.expected[:2]))
    code, out, _ = level("shadow", "-p", "rkv")
    assert code == 1
    assert re.search(r"rkv +20 +\d+ +2 ", out), out


def test_the_forced_level_gives_masses_and_agreement(level, folder, trace, tmp_path):
    code, out, err = level(
        "forced", "-p", "rkv,random", "--format", "csv", "--steps", tmp_path / "steps.parquet", "--seed", 2
    )
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'steps.parquet'}: 120 rows\n")
    model = load_model(str(folder / NAME), "float32", "cpu").model
    forced = run_forced(model, trace, parse_policy("rkv", buffer=6), 20)
    row, drawn = pl.read_csv(out.encode()).iter_rows(named=True)
    random = [run_forced(model, trace, parse_policy("random", buffer=6), 20, seed=seed) for seed in (2, 0)]
    assert drawn["forced_mass"] == pytest.approx(random[0].forced.mean(), abs=1e-6)
    assert drawn["forced_mass"] != pytest.approx(random[1].forced.mean(), abs=1e-6)
    assert row["forced_mass"] == pytest.approx(forced.forced.mean(), abs=1e-6)
    assert row["simulated_mass"] == pytest.approx(forced.simulated.mean(), abs=1e-6)
    assert row["agreement"] == pytest.approx(forced.agrees.mean())
    assert row["drift_layer_1"] == pytest.approx(forced.drift[1].mean(), abs=1e-6)
    steps = pl.read_parquet(tmp_path / "steps.parquet")
    assert steps.columns == [
        "trace_id",
        "trace",
        *GROUP,
        "layer",
        "step",
        "simulated_mass",
        "forced_mass",
        "simulated_lost_lookups",
        "forced_lost_lookups",
    ]
    own = steps.filter(policy="rkv").select(list(forced_steps(forced)))
    assert own.equals(pl.DataFrame(forced_steps(forced)))
    assert len(steps) == 2 * len(own)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.json", "rows.txt"])
def test_levels_are_written_to_a_file(level, tmp_path, name):
    code, out, err = level("shadow", "-p", "rkv", "-o", tmp_path / name)
    assert (code, out, err) == (0, "", f"sim: wrote {tmp_path / name}: 1 row\n")
    if name.endswith("parquet"):
        assert pl.read_parquet(tmp_path / name)["mismatches"].to_list() == [0]
    else:
        assert "mismatches" in (tmp_path / name).read_text()


def test_cells_that_fail_leave_the_others(level, run_sim, trace):
    code, out, err = level("shadow", "-p", "rkv,rkv+wave,snapkv", "--format", "json", budget="3,20")
    assert code == 1
    assert [row["policy"] for row in json.loads(out)] == ["rkv", "snapkv"]
    lines = err.splitlines()
    assert all(line.startswith("sim: ") for line in lines)
    assert "budget 3 entries" in lines[0]
    assert NAME in lines[-2]  # the model without a wave
    assert lines[-1] == "sim: 4 cells failed, the others are written"


def test_if_all_cells_fail_the_first_reason_is_the_exit_code(level, run_sim, trace):
    code, out, err = level("forced", "-p", "rkv", budget="3")
    assert (code, out) == (5, "")
    one_line(err, "budget 3 entries")
    code, out, err = level("shadow", "-p", "rkv+wave")
    assert (code, out) == (4, "")
    one_line(err, "wave")
    code, _, err = run_sim("--level", "shadow", "--trace", trace.path, "--device", "cpu", "-b", "20%")
    assert code == 2
    one_line(err, "allowed: the model the trace was recorded from")


# Live ----------------------------------------------------------------------------------------------------


def test_a_live_run_prints_accuracy_and_goes_on_where_it_ended(live, tmp_path, monkeypatch):
    code, out, err = live("-p", "rkv,random", "-b", "20,60%", "--batch", 2)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if "fullkv" in line or "r" in line.split()[:2]]
    assert "walk: 3 problems" in out
    assert len(re.findall(r"\bfullkv\b", out)) == 1
    assert len(re.findall(r"\brkv\b", out)) == len(re.findall(r"\brandom\b", out)) == 2
    assert lines
    assert len(list((tmp_path / "run" / "batches").iterdir())) == 2 * 5
    table = pl.read_csv(tmp_path / "run" / "accuracy.csv")
    assert table.select("policy", "budget_asked", "n_problems").rows() == [
        ("fullkv", None, 3),
        ("rkv", 20, 3),
        ("random", 20, 3),
        ("rkv", 60, 3),
        ("random", 60, 3),
    ]
    # Nothing is left to do: no process starts.
    monkeypatch.setattr(matrix, "ProcessPoolExecutor", None)
    assert live("-p", "rkv,random", "-b", "20,60%", "--batch", 2) == (0, out, "")


def test_live_rows_are_written_to_files(live, tmp_path):
    options = ["-p", "rkv", "-b", "20"]
    for name in ("rows.parquet", "rows.csv", "rows.json", "rows.txt"):
        code, out, err = live(*options, "-o", tmp_path / name)
        assert (code, out) == (0, "")
        assert re.fullmatch(rf"sim: wrote {tmp_path / name}: \d+ rows\n", err)
        assert live(*options, "-o", tmp_path / name, "-q") == (0, "", "")
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert list(rows.schema)[: len(ROW_SCHEMA)] == list(ROW_SCHEMA)
    assert rows["policy"].to_list() == ["fullkv"] * 3 + ["rkv"] * 3
    listed = json.loads((tmp_path / "rows.json").read_text())
    assert [row["token_ids"] for row in listed] == rows["token_ids"].to_list()
    assert pl.read_csv(tmp_path / "rows.csv").columns == [
        name for name in rows.columns if name != "token_ids"
    ]
    assert "walk: 3 problems" in (tmp_path / "rows.txt").read_text()
    code, out, _ = live(*options, "--format", "json")
    assert (code, json.loads(out)) == (0, listed)


def test_configurations_are_taken_from_a_file(live, tmp_path):
    configs = tmp_path / "winners.json"
    cells = [("rkv:alpha=0.2", "60%"), ("snapkv", 20), ("snapkv", "20")]
    configs.write_text(json.dumps([{"policy": policy, "budget": budget} for policy, budget in cells]))
    code, out, err = live("--configs", configs, "--format", "json")
    assert (code, err) == (0, "")
    found = [(row["policy"], row["budget_asked"], row["budget_unit"]) for row in json.loads(out)[::3]]
    assert found == [("fullkv", None, None), ("rkv", 60, "%"), ("snapkv", 20, "entries")]
    parameters = json.loads(json.loads(out)[3]["policy_params"])
    assert (parameters["alpha"], parameters["buffer"]) == (0.2, 4)


def test_samples_are_drawn_at_a_temperature(live):
    options = ["-p", "rkv", "-b", "20", "--samples", 2, "--temperature", 1.5, "--top-p", 0.9, "--seed", 4]
    code, out, _ = live(*options, "--limit", 2, "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["problem"], row["sample"]) for row in rows[:4]] == [
        (problem.id, sample) for problem in PROBLEMS[:2] for sample in (0, 1)
    ]
    assert len({tuple(row["token_ids"]) for row in rows[:4]}) == 4


@pytest.mark.parametrize(
    ("given", "n_tokens"), [([], 8), (["--stretch", 2], 16), (["--temperature", 0.01], 16)]
)
def test_a_text_under_eviction_may_be_longer_by_the_stretch(live, given, n_tokens):
    code, out, _ = live("-p", "rkv", "-b", "500", "--limit", 1, "--format", "json", *given)
    assert code == 0
    assert [row["n_tokens"] for row in json.loads(out)] == [8, n_tokens]


def test_parameters_tell_policies_of_one_name_apart(live, tmp_path):
    code, out, _ = live("-p", "rkv,rkv:alpha=0.9", "-b", "20", "--report", tmp_path / "report.html")
    assert code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("rkv:alpha=0.1", "rkv:alpha=0.9"):
        assert name in out
        assert name in page


def test_a_replay_of_several_models_is_refused(live, simulated):
    rows = pl.read_parquet(simulated)
    write_parquet(pl.concat([rows, rows.with_columns(model=pl.lit("another"))]), simulated)
    code, _, err = live("-p", "rkv", "-b", "20", "--simulated", simulated)
    assert code == 2
    one_line(err, f"--simulated {simulated} holds rows of another, {NAME}; allowed: one model's")


def test_batches_that_fail_leave_the_others(live):
    code, out, err = live("-p", "rkv,rkv+wave", "-b", "3,20", "--format", "json")
    assert code == 1
    assert [row["policy"] for row in json.loads(out)] == ["fullkv"] * 3 + ["rkv"] * 3
    lines = err.splitlines()
    assert "budget 3 entries" in lines[0]
    assert all(line.startswith("sim: ") for line in lines)
    assert lines[-1] == "sim: 3 batches failed, the others are written"


def test_an_interrupt_says_how_to_go_on(live, monkeypatch):
    run_batch, n_run = matrix._run_batch, []

    def interrupt_fourth(folder, batch):
        n_run.append(batch)
        if len(n_run) == 4:
            raise KeyboardInterrupt
        run_batch(folder, batch)

    monkeypatch.setattr(matrix, "_run_batch", interrupt_fourth)
    options = ["-p", "rkv,random", "-b", "3,20", "--jobs", 1]  # 3 entries are too few
    code, out, err = live(*options)
    assert (code, out) == (130, "")
    one_line(err, "interrupted with 1 of 5 batches done: the same command again goes on with the others")
    n_run.append(None)
    assert live(*options, "--format", "json")[0] == 1
    assert [batch.policy.name for batch in n_run[5:] if batch.budget.amount == 20] == ["rkv", "random"]


RIGHT = {"rkv": 2, "streamingllm": 1, "random": 0}


@pytest.fixture
def answering(monkeypatch, folder):
    """Let policies answer as many problems as RIGHT says, and the full cache all."""
    tokenizer = build_tokenizer()
    problems = {tuple(encode_prompt(tokenizer, own.prompt)): i for i, own in enumerate(PROBLEMS)}
    texts = [encode_prompt(tokenizer, own.completion)[1:] for own in PROBLEMS]

    def decode(model, prompts, policy, *_, **__):
        numbers = [problems[tuple(prompt)] for prompt in prompts]
        right = [not policy.evicts or number < RIGHT[policy.name] for number in numbers]
        return [
            Completion(texts[number] if own else texts[number][:6] * 9, own, 4096, 2048.0)
            for number, own in zip(numbers, right, strict=True)
        ]

    monkeypatch.setattr(completions, "decode", decode)


@pytest.fixture
def simulated(run_sim, folder, tmp_path):
    """Rows of a replay of the tiny model's traces."""
    path = tmp_path / "simulated.parquet"
    options = ["--trace", folder, "-p", ",".join(RIGHT), "-b", "20,30", "--buffer", 4, "-o", path]
    assert run_sim(*options, verb="replay")[0] == 0
    return path


def test_answers_are_compared_with_what_the_simulator_said(live, answering, simulated, tmp_path):
    report = tmp_path / "report.html"
    options = ["-p", ",".join(RIGHT), "-b", "20,30", "--simulated", simulated]
    code, out, err = live(*options, "--report", report)
    assert (code, err) == (0, f"sim: wrote {report}: 3 charts\n")
    assert re.search(r"20\s+rkv\s+0\.667\s", out)
    assert "walk: what predicts accuracy, 6 cells of 3 problems, 2 traces" in out
    fidelity = pl.read_csv(tmp_path / "run" / "fidelity.csv")
    assert set(fidelity["metric"]) == {*METRICS, LIVE_HALF}
    row = fidelity.row(by_predicate=pl.col("metric") == "mass_mean", named=True)
    assert f"{row['spearman']:.3f}" in out
    replayed = pl.read_parquet(simulated).group_by("policy", "budget_asked").agg(pl.col("mass_mean").mean())
    regrets = [
        2 / 3 - RIGHT[own.sort("mass_mean")["policy"][-1]] / 3 for _, own in replayed.group_by("budget_asked")
    ]
    assert row["regret"] == pytest.approx(sum(regrets) / 2)
    page = report.read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 3
    assert sorted(path.stem for path in (tmp_path / "run").glob("*.svg")) == [
        "accuracy",
        "predictors",
        "scatter",
    ]
    for path in (tmp_path / "run").glob("*.svg"):
        assert path.read_text(encoding="utf-8").strip() in page
    assert not re.search(r"<script|<link|src=|@import", page)
    assert all(name in figures[0] for name in RIGHT)
    assert "full cache 100%" in figures[0]
    shares = "66.7%", "33.3%", "0.0%", "100.0%"
    for words in (*shares, "3 problems, 3 policies, 2 budgets", best_metric(fidelity)):
        assert words in page
    # With rows in a file, what predicts them is still told.
    code, out, _ = live(*options, "-o", tmp_path / "rows.parquet")
    assert (code, "what predicts accuracy" in out) == (0, True)
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert accuracy_table(rows).select("policy", "accuracy").rows()[:3] == [
        ("fullkv", 1.0),
        ("rkv", pytest.approx(2 / 3)),
        ("streamingllm", pytest.approx(1 / 3)),
    ]


def test_one_policy_alone_is_reported_though_nothing_is_compared(live, answering, simulated, tmp_path):
    options = ["-p", "rkv", "-b", "20", "--simulated", simulated, "--report", tmp_path / "report.html"]
    code, out, err = live(*options)
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'report.html'}: 3 charts\n")
    assert "1 cell of 3 problems" in out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") == 3


def test_policies_at_different_budgets_are_reported(live, tmp_path):
    configs = tmp_path / "configs.json"
    configs.write_text('[{"policy": "rkv", "budget": "20"}, {"policy": "rkv+utility", "budget": "30"}]')
    code, _, err = live("--configs", configs, "--report", tmp_path / "report.html")
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'report.html'}: 1 chart\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") == 1


def test_a_report_without_its_packages_is_refused(live, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "validate.live.charts", raising=False)
    monkeypatch.delattr(validate.live, "charts", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    code, _, err = live("-p", "rkv", "-b", "20", "--report", tmp_path / "report.html")
    assert code == 2
    one_line(err, "pip install 'kvbudget[plots]'")


# Mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--level", "half"], "--level is 'half'; allowed: live, shadow, forced"),
        ([], "--level live needs --prompts FILE.jsonl and --out FOLDER"),
        (["--prompts", "{prompts}"], "needs --prompts FILE.jsonl and --out"),
        (["--out", "{out}"], "needs --prompts"),
        (["--level", "shadow"], "--level shadow needs --trace"),
        (
            ["--level", "shadow", "-t", "{trace}", "--prompts", "{prompts}"],
            "--prompts goes with --level live",
        ),
        (["--level", "forced", "-t", "{trace}", "--out", "{out}"], "--out goes with --level live"),
        (["--level", "forced", "-t", "{trace}", "--report", "{out}"], "--report goes with --level live"),
        (
            ["--level", "forced", "-t", "{trace}", "--simulated", "{out}"],
            "--simulated goes with --level live",
        ),
        (["--level", "shadow", "-t", "{trace}", "--steps", "{out}"], "--steps goes with --level forced"),
        (["--level", "shadow", "-t", "{trace}", "-o", "rows.xml"], "suffix tells no format"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(run_sim, folder, trace, tmp_path, options, words):
    names = {"prompts": folder / "problems.jsonl", "out": tmp_path / "run", "trace": trace.path}
    code, out, err = run_sim(*(option.format(**names) for option in options))
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "sample"], "--trace goes with --level shadow or forced"),
        (["--steps", "steps.parquet"], "--steps goes with --level forced"),
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
        (["--prompts", "/none.jsonl"], "--prompts is given 2 times; allowed: once, or with --config"),
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
    one_line(err, "line 2: no answer; --level live grades answers")
    assert not (tmp_path / "run").exists()


def test_mathematics_without_its_grader_is_refused(live, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "What is $1 + 1$?", "answer": "2"}\n')
    code, _, err = live(prompts=path)
    assert code == 2
    one_line(err, "pip install 'kvbudget[math]'")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_is_refused(live):
    assert live("-p", "rkv", "-b", "20")[0] == 0
    code, out, err = live("-p", "rkv", "-b", "20", n=9)
    assert (code, out) == (2, "")
    one_line(err, "holds results of other settings: its live is", "allowed: another folder")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("text", "other.parquet is damaged or no parquet file"),
        (pl.DataFrame({"a": [1]}), "other.parquet has no column 'trace_id'"),
        ("metrics", "other.parquet has no column 'mass_mean'"),
    ],
)
def test_what_is_no_replay_is_refused_before_anything_is_decoded(live, simulated, tmp_path, table, words):
    path = tmp_path / "other.parquet"
    if isinstance(table, pl.DataFrame):
        write_parquet(table, path)
    elif table == "metrics":
        rows = pl.read_parquet(simulated)
        write_parquet(rows.drop("mass_mean"), path)
    else:
        path.write_text("trace_id,family\n")
    code, out, err = live("--simulated", path)
    assert (code, out) == (2, "")
    one_line(err, words)
    assert not (tmp_path / "run").exists()


def test_a_replay_of_other_policies_is_refused(live, simulated):
    code, _, err = live("-p", "snapkv", "-b", "20", "--simulated", simulated)
    assert code == 2
    one_line(err, "no family, policy and budget is in both")


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


def test_a_missing_trace_exits_3(run_sim, tmp_path):
    code, _, err = run_sim("--level", "shadow", "--trace", tmp_path / "none*.kvtrace")
    assert code == 3
    one_line(err, "none*.kvtrace")
