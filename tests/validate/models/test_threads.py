"""A small model that reads one text is run by one thread; processes that decode batches share the cores."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model

from simulator.workers.cores import n_cores
from validate.live import matrix
from validate.live.matrix import MatrixSettings
from validate.models.threads import limit_threads, share_threads
from validate.problems.families import make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer


@pytest.fixture(autouse=True)
def _several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_small_model_has_one_thread_and_a_large_one_those_of_torch():
    limit_threads(torch.nn.Linear(20_000, 10_000, device="meta"))
    assert torch.get_num_threads() == 3
    limit_threads(torch.nn.Linear(1_000, 10_000, device="meta"))
    assert torch.get_num_threads() == 1


def test_processes_share_the_cores_and_have_one_thread_at_least(monkeypatch):
    monkeypatch.setattr("validate.models.threads.n_cores", lambda: 7)
    for n_processes, n_threads in ((1, 7), (2, 3), (9, 1)):
        share_threads(n_processes)
        assert torch.get_num_threads() == n_threads


@pytest.fixture
def saved(tmp_path):
    tiny_model(vocab_size=VOCABULARY_SIZE).save_pretrained(tmp_path / "tiny")
    build_tokenizer().save_pretrained(tmp_path / "tiny")
    problem = make_problem("walk", 1, 0, size=4, length=60)
    row = {"prompt": problem.prompt, "answer": problem.answer}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_recording_and_comparing_use_one_thread_for_a_small_model(saved, run_sim):
    base = ["--model", saved / "tiny", "--device", "cpu"]
    options = ["--prompts", saved / "p.jsonl", "--out", saved / "out", "--max-new-tokens", 8]
    assert run_sim("record", *base, *options)[0] == 0
    assert torch.get_num_threads() == 1
    for level in ("shadow", "forced"):
        torch.set_num_threads(3)
        levels = ["--trace", saved / "out", "-p", "rkv", "-b", "20", "--buffer", 4]
        assert run_sim("validate", level, *base, *levels)[0] == 0
        assert torch.get_num_threads() == 1


def test_processes_that_decode_share_the_cores(saved, monkeypatch):
    monkeypatch.setattr(matrix, "_worker", {})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    settings = MatrixSettings(model=str(saved / "tiny"), prompts=str(saved / "p.jsonl"))
    matrix._start_worker(settings, 1)
    assert torch.get_num_threads() == n_cores()
    matrix._start_worker(settings, n_cores())
    assert torch.get_num_threads() == 1
