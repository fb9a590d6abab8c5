"""The door: cells that succeed, cells that fail, exit codes and tables."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
from agreement import make_wave

from simulator import replay, run_replay
from simulator.policies.language import Policy, parse_policy
from simulator.policies.parts import Scorer
from simulator.results.tables import RETAINED_SCHEMA, ROW_SCHEMA, result_table, summarise
from traces.errors import TraceError, UserError

IDENTITY = ["trace_id", "model", "policy", "policy_params", "budget_asked", "budget_unit"]
MEASURED = [
    "entries_mean",
    "entries_peak",
    "bytes_mean",
    "bytes_peak",
    "mass_mean",
    "mass_p05",
    "mass_min_head",
]
MEASURED += ["miss_rate", "oracle_mass", "gap", "n_steps", "n_evictions"]
SPECIFIED = [*IDENTITY, *MEASURED, "seconds", "code_version", "status", "error"]


def test_one_row_per_cell_with_the_agreed_columns(make_trace):
    traces = [make_trace(), make_trace(n_tokens=50)]
    policies = ["rkv:buffer=5", "random:buffer=7"]
    result = run_replay(traces, policies, [12, "30%", "5KB"])
    table = result.table
    assert result.exit_code == 0
    assert list(table.columns[:22]) == SPECIFIED
    assert dict(table.schema) == ROW_SCHEMA
    asked = table.select("trace_id", "policy", "budget_asked", "budget_unit").rows()
    assert asked == [
        (trace.trace_id, policy, *budget)
        for trace in traces
        for policy in ("rkv", "random")
        for budget in ((12.0, "entries"), (30.0, "%"), (5.0, "KB"))
    ]
    # 5 KB over 4 KV heads of 32-byte entries are 39; 30% of 60 and 50 tokens are 18 and 15.
    assert table["budget_entries"].to_list() == [12, 18, 39] * 2 + [12, 15, 39] * 2
    assert json.loads(table["policy_params"][0])["buffer"] == 5
    assert table["status"].unique().to_list() == ["ok"]
    assert table["error"].null_count() == 12
    assert table.select(MEASURED).null_count().sum_horizontal().item() == 0
    assert len(result.retained) == 0


def test_results_do_not_depend_on_threads_or_repetition(make_trace):
    trace = make_trace(n_layers=3)
    cells = [trace], ["reasonalloc:buffer=5", "random:buffer=5", "snapkv:buffer=5"], [12, 20]
    wave = trace.path.parent / "wave.json"
    make_wave(trace, [1.0, 2.0, 3.0]).write(wave)
    results = [run_replay(*cells, jobs=jobs, waves=[wave], keep_retained=True) for jobs in (1, 1, 3)]
    for other in results[1:]:
        assert other.table.drop("seconds").equals(results[0].table.drop("seconds"))
        assert other.retained.equals(results[0].retained)


def test_seed_matters_to_random_policies_alone(make_trace):
    cells = [make_trace()], ["random:buffer=5", "rkv:buffer=5"], [12]
    one, two = (run_replay(*cells, seed=seed).table["mass_mean"].to_list() for seed in (0, 1))
    assert one[0] != two[0]
    assert one[1] == two[1]


def test_retained_table_names_every_slot(make_trace):
    trace = make_trace()
    result = run_replay([trace], ["snapkv:buffer=20", "fullkv"], [12, 15], keep_retained=True)
    table = result.retained
    assert dict(table.schema) == RETAINED_SCHEMA
    assert table["policy"].unique().to_list() == ["snapkv"]
    # Compressions at 20 and 40 tokens in each of 4 KV heads; the one at 60 would be after the last step.
    counts = table.group_by("budget_asked", "n_tokens", maintain_order=True).len().rows()
    assert sorted(counts) == [(12, 20, 48), (12, 40, 48), (15, 20, 60), (15, 40, 60)]
    first = table.filter(budget_asked=12, layer=1, kv_head=1, compression=0)
    assert first["slot"].to_list() == list(range(12))
    assert first["position"].to_list() == sorted(first["position"].to_list())
    assert set(range(12, 20)) <= set(first["position"])


@pytest.mark.parametrize(
    ("policies", "budgets", "exit_code", "statuses"),
    [
        (["rkv"], [20], 0, ["ok"]),
        (["rkv"], [8, 5], 5, ["error", "error"]),
        (["rkv", "streamingllm"], [8], 1, ["error", "ok"]),
        (["rkv"], [8, 9], 1, ["error", "ok"]),
        (["reasonalloc"], [20], 4, ["error"]),
        (["reasonalloc", "rkv"], [20], 1, ["error", "ok"]),
        (["rkv"], ["1%", "10B"], 5, ["error", "error"]),
        (["fullkv"], [1], 0, ["ok"]),
    ],
)
def test_exit_codes(policies, budgets, exit_code, statuses, make_trace):
    result = run_replay([make_trace()], policies, budgets)
    assert result.exit_code == exit_code
    assert result.table["status"].to_list() == statuses
    for row in result.table.iter_rows(named=True):
        assert (row["error"] is None) == (row["status"] == "ok")
        assert all((row[name] is None) == (row["status"] == "error") for name in MEASURED)
        assert "\n" not in (row["error"] or "")


def test_errors_of_cells_name_the_value_and_what_is_allowed(make_trace):
    table = run_replay([make_trace()], ["rkv", "reasonalloc"], [8, 20]).table
    assert "8 entries" in table["error"][0]
    assert "at least 9" in table["error"][0]
    assert "custom" in table["error"][3]


@dataclass(frozen=True)
class Broken(Scorer):
    name: ClassVar[str] = "broken"
    fault: str = "shape"
    after: int = 0

    def score(self, view):
        scores = np.zeros(view.n_entries, np.float32)
        if view.n_tokens <= self.after:
            return scores
        if self.fault == "nan":
            scores[1] = np.nan
        return scores[1:] if self.fault == "shape" else scores


@pytest.mark.parametrize("fault", ["shape", "nan"])
@pytest.mark.parametrize("after", [0, 40])
def test_broken_scorer_fails_its_own_cell_only(fault, after, make_trace):
    trigger = parse_policy("rkv:buffer=5").trigger
    broken = Policy("broken", Broken(fault, after), trigger=trigger)
    table = run_replay([make_trace()], ["rkv:buffer=5"], [12]).table
    result = run_replay([make_trace()], [broken, "rkv:buffer=5"], [12], jobs=2)
    assert result.exit_code == 1
    assert result.table["status"].to_list() == ["error", "ok"]
    assert "scorer 'broken' returned" in result.table["error"][0]
    assert result.table["n_evictions"][1] == table["n_evictions"][0]
    assert run_replay([make_trace()], [broken], [12]).exit_code == 1


def test_nothing_is_replayed_when_the_request_cannot_be_read(make_trace, tmp_path):
    trace, cells = make_trace(), []

    def attempt(*arguments, **options):
        run_replay(*arguments, on_cell=lambda: cells.append(1), **options)

    with pytest.raises(UserError, match="h3o"):
        attempt([trace], ["rkv", "h3o"], [20])
    with pytest.raises(UserError, match="bare fraction"):
        attempt([trace], ["rkv"], [20, "0.1"])
    with pytest.raises(TraceError, match="gone"):
        attempt([trace, tmp_path / "gone.kvtrace"], ["rkv"], [20])
    with pytest.raises(UserError, match="no decode step"):
        attempt([trace, make_trace(prompt_tokens=60)], ["rkv"], [20])
    with pytest.raises(UserError, match=r"gone\.json"):
        attempt([trace], ["rkv"], [20], waves=[tmp_path / "gone.json"])
    assert cells == []
    attempt([trace], ["rkv"], [20, 8])
    assert cells == [1, 1]


def test_replay_takes_single_values_and_paths(make_trace):
    trace = make_trace()
    tables = [
        replay(trace, "rkv:buffer=5", 12),
        replay(str(trace.path), parse_policy("rkv:buffer=5"), "12"),
        replay([trace.path], ["rkv:buffer=5"], [12]),
    ]
    assert all(len(table) == 1 for table in tables)
    assert len({table["mass_mean"].item() for table in tables}) == 1
    assert "jobs" in inspect.signature(run_replay).parameters


def test_summary_averages_over_traces_with_a_bootstrap_interval(make_trace):
    traces = [make_trace() for _ in range(4)]
    table = run_replay(traces, ["rkv:buffer=5", "streamingllm:buffer=5"], [8, 12]).table
    summary = summarise(table)
    assert summary.select("policy", "budget_asked", "n_traces").rows() == [
        ("rkv", 12.0, 4),
        ("streamingllm", 8.0, 4),
        ("streamingllm", 12.0, 4),
    ]
    for row in summary.iter_rows(named=True):
        cells = table.filter(policy=row["policy"], budget_asked=row["budget_asked"])
        assert row["mass_mean"] == pytest.approx(cells["mass_mean"].mean())
        assert row["entries_peak"] == cells["entries_peak"].max()
        assert cells["mass_mean"].min() <= row["mass_low"] <= row["mass_mean"] <= row["mass_high"]
        assert row["mass_high"] <= cells["mass_mean"].max()
    assert summarise(table).equals(summary)
    assert len(summarise(table.filter(pl.col("status") == "error"))) == 0


def rows_of(policy, masses, n_evictions=5):
    labels = {"policy": policy, "policy_params": "{}", "budget_asked": 8.0, "budget_unit": "entries"}
    shared = labels | {"budget_kind": "kept", "status": "ok", "n_evictions": n_evictions}
    return [shared | {"trace_id": str(i), "mass_mean": mass} for i, mass in enumerate(masses)]


def test_summary_tells_differences_from_noise_trace_by_trace():
    # Traces differ far more than policies do: only the paired comparison can see that one is behind.
    level = np.linspace(0.2, 0.9, 12)
    wobble = np.where(np.arange(12) % 2, 0.01, -0.0099)
    table = result_table(
        [
            *rows_of("fullkv", level + 0.05, n_evictions=0),
            *rows_of("best", level),
            *rows_of("close", level + wobble - 0.0001),
            *rows_of("behind", level - 0.02),
        ]
    )
    table = table.with_columns(bytes_mean=pl.lit(100))
    summary = {row["policy"]: row for row in summarise(table).iter_rows(named=True)}
    assert summary["best"]["behind"] is None
    assert summary["fullkv"]["behind"] is None  # it evicts nothing: no rival at this budget
    assert summary["behind"]["behind"] == pytest.approx(0.02)
    assert summary["behind"]["behind_low"] > 0
    assert summary["close"]["behind_low"] < 0 < summary["close"]["behind_high"]


def test_summary_compares_policies_on_the_same_traces_only(make_trace):
    # At 16% the longer trace gives rkv the 9 entries it needs, the shorter one does not.
    traces = [make_trace(n_tokens=50), make_trace(n_tokens=90)]
    table = run_replay(traces, ["rkv:buffer=5", "streamingllm:buffer=5"], ["11%", "30%"]).table
    assert table["status"].to_list().count("error") == 1
    summary = summarise(table)
    asked = ["rkv", "rkv", "streamingllm", "streamingllm"]
    assert summary["policy"].to_list() == asked  # in the order asked, whatever failed first
    small = summary.filter(budget_asked=11.0)
    assert small["n_traces"].to_list() == [1, 1]
    longer = table.filter(trace_id=traces[1].trace_id, budget_asked=11.0)
    assert small["mass_mean"].to_list() == longer["mass_mean"].to_list()
    assert summary.filter(budget_asked=30.0)["n_traces"].to_list() == [2, 2]


def test_the_api_reads_lists_as_the_command_does(make_trace, tmp_path):
    make_trace()
    table = replay(str(tmp_path), "rkv:window=4,buffer=5,snapkv", "12,20")
    assert table["policy"].to_list() == ["rkv", "rkv", "snapkv", "snapkv"]
    again = replay(tmp_path, ["rkv", "rkv:buffer=128"], [np.int64(12), "12"])
    assert len(again) == 1  # the same cell in other words
    for nothing in ({"traces": []}, {"policies": []}, {"budgets": []}):
        with pytest.raises(UserError, match="at least one"):
            replay(**{"traces": tmp_path, "policies": "rkv", "budgets": 12} | nothing)
    with pytest.raises(UserError, match="10%"):
        replay(tmp_path, "rkv", 0.1)
