"""What a process of a live run writes and says, and what is said when it dies."""

from __future__ import annotations

import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import polars as pl
import pytest
import torch
from live_runs import CELLS, DRAWN, RANDOM, RKV, ran, run, settings_for

from simulator.budget import parse_budget
from simulator.policies.language import parse_policy
from traces.errors import InfeasibleBudgetError, MissingDataError, NoDeviceError, UserError
from validate.live import matrix
from validate.live.completions import ROW_SCHEMA, LiveSettings, baselines_of, complete
from validate.live.matrix import FULL, Batch, Matrix
from validate.problems.prompts import read_prompts


@pytest.fixture
def worker(monkeypatch):
    """An empty worker in this process."""
    monkeypatch.setattr(matrix, "_worker", {})
    n_threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(n_threads)
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.slow
def test_a_worker_writes_the_rows_of_a_batch(folder, tmp_path, loaded, worker):
    live = LiveSettings(max_new_tokens=8, samples=2, sampling=DRAWN.sampling)
    asked = settings_for(folder, live=live)
    own = Matrix(tmp_path, asked, 4)
    batches = own.batches(CELLS[:2])[3:]
    matrix._start_worker(asked)
    for batch in batches:
        matrix._run_batch(tmp_path, batch)
    assert all(own.is_done(batch) for batch in batches)
    prompts = read_prompts(folder / "problems.jsonl")[2:]
    full = complete(loaded, prompts, FULL, None, live, first=2)
    random = run(loaded, prompts, "20", RANDOM, live, baselines_of(full), first=2)
    written = own.table(batches)
    assert list(written.schema) == [*ROW_SCHEMA, "seconds", "code_version"]
    assert (written["seconds"] > 0).all()
    same = written.select(list(ROW_SCHEMA))
    assert same[:4].equals(full)
    assert same[8:].equals(random)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": "./none"}, UserError, "is not a folder here"),
        ({"waves": ("./none.json",)}, MissingDataError, "none.json"),
    ],
)
def test_a_worker_that_cannot_start_says_why_for_its_batches(change, kind, words, folder, tmp_path, worker):
    matrix._start_worker(replace(settings_for(folder), **change))
    with pytest.raises(kind, match=words):
        matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))


def test_a_device_without_memory_says_what_to_do(folder, tmp_path, worker, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    matrix._start_worker(settings_for(folder))
    monkeypatch.setattr(matrix, "complete", fail)
    with pytest.raises(NoDeviceError, match="2 problems at once do not fit"):
        matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))


@pytest.mark.slow
def test_what_a_users_part_raises_fails_its_batch_in_words(folder, tmp_path, worker):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from simulator.policies.heads.utility import UtilityHeads\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(UtilityHeads):\n"
        "    name = 'mine'\n\n"
        "    def table(self, request):\n"
        "        raise KeyError('horizon')\n"
    )
    asked = settings_for(folder)
    Matrix(tmp_path, asked, 2)
    matrix._start_worker(asked)
    matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))
    policy = parse_policy(f"rkv+{tmp_path}/mine.py:Mine:window=2", buffer=2)
    with pytest.raises(UserError, match=r"'mine' failed: KeyError: 'horizon' \(mine.py, line 10\)"):
        matrix._run_batch(tmp_path, Batch(policy, parse_budget("20"), 0, 2))


def test_a_process_that_dies_is_told_in_one_line(folder, tmp_path, calls, monkeypatch):
    def die(*_):
        raise BrokenProcessPool

    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    calls(asked)
    monkeypatch.setattr(matrix, "_run_batch", die)
    with pytest.raises(UserError, match="a worker process died"):
        own.run(own.batches(CELLS), 1, lambda *_: None)


@pytest.mark.slow
def test_processes_decode_a_matrix(folder, tmp_path):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 3)
    batches = own.batches([*CELLS, (RKV, parse_budget("3"))])
    errors, told = ran(own, batches)
    assert {batch for batch, error in told if error} == set(errors)
    assert set(errors) == {batches[4], batches[9]}
    assert all(isinstance(error, InfeasibleBudgetError) for error in errors.values())
    assert len(told) == len(batches) == 10
    table = own.table(batches)
    assert len(table) == 3 * 4
    assert table.filter(pl.col("policy") == "fullkv")["n_tokens"].to_list() == [8] * 3
    assert len(list((tmp_path / "batches").iterdir())) == 8
