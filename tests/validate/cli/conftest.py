"""A tiny model, its problems and traces, and the verbs that run it in this process."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from spies import NAME, InThisProcess
from tiny_models import tiny_model
from verb_runs import PROBLEMS, RIGHT

from traces.store import open_trace
from validate.cli import main as cli
from validate.eviction.decode import Completion
from validate.live import completions, matrix
from validate.live.fidelity import fidelity_table
from validate.models.load import load_model
from validate.problems.prompts import encode_prompt
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer
from validate.record.decode import record_decode


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def trace(folder):
    return open_trace(sorted(folder.glob("*.kvtrace"))[0])


@pytest.fixture
def run_sim(monkeypatch, capsys):
    """Run a verb in this process; give exit code, standard output and standard error."""
    monkeypatch.setattr(matrix, "processes", InThisProcess)
    monkeypatch.setattr(matrix, "_worker", {})
    # A process that decodes sets these for itself.
    n_threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("validate.live.output.fidelity_table", partial(fidelity_table, resamples=20))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield run
    torch.set_num_threads(n_threads)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture
def live(run_sim, folder, tmp_path):
    """Run ``sim validate live`` on the tiny model."""

    def run(*options, prompts=folder / "problems.jsonl", n=8, model=folder / NAME, out=tmp_path / "run"):
        base = ["--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", n]
        return run_sim("validate", "live", *base, "--device", "cpu", "--buffer", 4, *options)

    return run


@pytest.fixture
def level(run_sim, folder, trace):
    """Run the shadow or forced level on one trace of the tiny model."""

    def run(name, *options, budget="20"):
        base = ["--model", folder / NAME, "--trace", trace.path, "--device", "cpu"]
        return run_sim("validate", name, *base, "--buffer", 6, "-b", budget, *options)

    return run


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
    assert run_sim("replay", *options)[0] == 0
    return path


@pytest.fixture
def protocol(run_sim, config, tmp_path):
    """Run ``sim validate protocol`` on the tiny model's protocol."""

    def run(*options, path=None):
        base = ["--config", path or config(), "--out", tmp_path / "run", "--device", "cpu"]
        return run_sim("validate", "protocol", *base, *options)

    return run
