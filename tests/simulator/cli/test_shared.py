"""What verbs share: counts, and reasons for which cells failed."""

from __future__ import annotations

import polars as pl
import pytest

from simulator.cli import shared
from simulator.workers import cores
from traces.errors import UserError


def test_counts_below_one_are_refused_by_the_name_of_their_option():
    shared.require_counts(samples=1, most_batch=None, stretch=1.5)
    for value in (0, -3, 0.9, float("nan")):
        with pytest.raises(UserError, match=rf"^--most-batch is {value}; allowed: 1 or more$"):
            shared.require_counts(samples=1, most_batch=value)


def test_each_reason_is_said_once_and_no_more_than_asked_for(capsys):
    reasons = ["too small", None, "too small", "no wave"]
    table = pl.DataFrame(
        {
            "status": ["ok" if reason is None else "failed" for reason in reasons],
            "error": reasons,
            "trace": ["a", "b", "c", "d"],
            "policy": ["rkv"] * 4,
            "budget_asked": [20.0] * 4,
            "budget_unit": ["%"] * 4,
            "budget_kind": ["kept"] * 4,
        }
    )
    assert shared.tell_failed(table) == 2
    assert capsys.readouterr().err == "sim: a, rkv at 20%: too small\nsim: d, rkv at 20%: no wave\n"
    assert shared.tell_failed(table, most=1) == 2
    assert capsys.readouterr().err == "sim: a, rkv at 20%: too small\n"
    assert shared.tell_failed(table.filter(status="ok")) == 0


def test_jobs_stand_for_workers(monkeypatch):
    monkeypatch.setattr(cores, "n_cores", lambda: 7)
    assert [cores.worker_count(jobs) for jobs in (0, 1, 9)] == [7, 1, 9]
    assert [cores.worker_count(jobs, default=1) for jobs in (0, 2)] == [1, 2]
    with pytest.raises(UserError, match=r"^--jobs is -1; allowed: 0 \(all cores\) or more$"):
        cores.worker_count(-1)
