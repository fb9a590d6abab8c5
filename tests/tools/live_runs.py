"""Live runs of a tiny model, and of none: batches that wait until one is waited for."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import polars as pl
from spies import NAME

from simulator.budget import parse_budget
from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from simulator.results.tables import budget_columns
from traces.errors import MissingDataError
from validate.live import matrix
from validate.live.completions import ROW_SCHEMA, LiveSettings, complete
from validate.live.matrix import MatrixSettings
from validate.models.next_token import Sampling
from validate.problems.families import make_problem

PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(4)]
N_NEW = 24
SETTINGS = LiveSettings(max_new_tokens=N_NEW)
RKV, RANDOM = parse_policy("rkv", buffer=4), parse_policy("random", buffer=4)
DRAWN = replace(SETTINGS, samples=2, sampling=Sampling(True, 1.5, 1.0, 7), seed=3)


def run(loaded, prompts, budget, policy=RKV, settings=SETTINGS, baselines=None, **options):
    return complete(
        loaded, prompts, policy, parse_budget(budget), settings, baselines=baselines, waves={}, **options
    )


def settings_for(folder, **fields):
    live = LiveSettings(max_new_tokens=8)
    own = {"model": str(folder / NAME), "prompts": str(folder / "problems.jsonl"), "batch": 2, "live": live}
    return MatrixSettings(**own | fields)


CELLS = [(RKV, parse_budget("20")), (RANDOM, parse_budget("20")), (RKV, parse_budget("60%"))]


class Waiting(Future):
    """A batch that is decoded when its end is asked for."""

    def result(self):
        if not self.done():
            self.calls.finish(self)
        return super().result()


class Calls:
    """Takes the place of processes: batches wait until one is waited for, which may be any of them."""

    def __init__(self, monkeypatch, asked, choose=lambda n: 0, failing=()):
        self.decoded, self.pending, self.choose, self.failing = [], {}, choose, failing
        self.settings = asked
        monkeypatch.setattr(matrix, "processes", lambda *_: self)
        monkeypatch.setattr(matrix, "_run_batch", self.run_batch)
        monkeypatch.setattr(matrix, "wait", self.wait)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for future in list(self.pending) if kind is None else ():
            self.finish(future)

    def submit(self, function, *arguments):
        future = Waiting()
        future.calls = self
        self.pending[future] = function, arguments
        return future

    def wait(self, running, **_):
        future = list(self.pending)[self.choose(len(self.pending))]
        self.finish(future)
        return {future}, set(running) - {future}

    def finish(self, future):
        function, arguments = self.pending.pop(future)
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    def run_batch(self, folder, batch):
        if batch.budget is not None:
            held = pl.read_parquet(batch.full.path(folder))
            assert len(held) >= batch.count * self.settings.live.samples, "decoded before its full-cache runs"
        self.decoded.append(batch)
        if (batch.policy.name, batch.first) in self.failing:
            raise MissingDataError(f"{batch.policy.name} at {batch.first} lacks a wave")
        problems = range(batch.first, batch.first + batch.count)
        samples = range(self.settings.live.samples)
        labels = {"policy": batch.policy.name, "policy_params": batch.policy.parameters_json}
        labels |= budget_columns(batch.budget)
        rows = [labels | {"problem": str(i), "sample": s} for i in problems for s in samples]
        write_parquet(pl.DataFrame(rows, schema=ROW_SCHEMA), batch.path(folder))


def ran(own, batches, jobs=1):
    """Run; give errors by batch, and what was told."""
    told = []
    errors = own.run(batches, jobs, lambda batch, error: told.append((batch, error)))
    return errors, told
