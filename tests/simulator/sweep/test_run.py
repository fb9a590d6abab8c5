"""Sweeps from file to table: rows, failures, what is kept and what is said."""

from __future__ import annotations

from fractions import Fraction

import polars as pl
import pytest
from agreement import make_wave
from sweeps import SLOW_POLICY, parts_of, table_of, write_spec

from simulator import cells
from simulator.cells import run_replay
from simulator.engine.sampling import Sampling
from simulator.results.tables import ROW_SCHEMA, comparable
from simulator.sweep import grid, tasks, worker
from simulator.sweep.folder import SweepFolder
from simulator.sweep.rows import read_rows
from simulator.sweep.run import run_sweep
from simulator.sweep.spec import read_spec
from traces.store import open_trace


@pytest.fixture(autouse=True)
def _nothing_prepared():
    worker._prepared.clear()


@pytest.fixture
def asked(make_trace, tmp_path):
    """Give a spec of 2 traces, 3 policies and 2 budgets, and the same for a replay."""
    paths = [str(make_trace(n_tokens=n, task={"family": f"f{n}"}).path) for n in (60, 50)]
    policies, budgets = ["fullkv", "rkv:buffer=5", "random:buffer=5"], [12, "40%"]
    return write_spec(tmp_path, traces=paths, policies=policies, budgets=budgets), (paths, policies, budgets)


def test_rows_are_those_of_a_replay(asked, tmp_path, run_sim):
    spec, replayed = asked
    code, out, err = run_sim("sweep", spec, "--jobs", 1)
    assert (code, out) == (0, "")
    said = err.splitlines()
    assert said[0].startswith("sim: 12 cells: 0 done before, 12 replayed in ")
    assert said[0].endswith(" cells/s), 0 failed")
    assert said[1] == (
        f"sim: rows are in {tmp_path / 'out'}: sim results {tmp_path / 'out'} --metric lost_lookup_peak"
    )
    table = SweepFolder(tmp_path / "out").table()
    assert table.columns == [*ROW_SCHEMA, "seed", "cell"]
    expected = run_replay(*replayed).table.drop("seconds")
    assert table.select(expected.columns).equals(expected)
    assert table["cell"].n_unique() == 12


def test_a_sample_is_measured_alike_in_a_sweep_and_a_replay(make_trace, tmp_path, run_sim):
    path = str(make_trace(n_layers=4, n_tokens=80).path)
    policies, budgets = ["rkv:buffer=5"], [12]
    content = {"traces": [path], "policies": policies, "budgets": budgets, "seeds": [0]}
    spec = write_spec(tmp_path, sampling={"queries": "1/4", "layers": 2}, **content)
    assert run_sim("sweep", spec, "--jobs", 1)[0] == 0
    table = SweepFolder(tmp_path / "out").table()
    assert table["sampling"].to_list() == ["queries=1/4,layers=2"]
    expected = run_replay([path], policies, budgets, sampling=Sampling(Fraction(1, 4), 2)).table.drop(
        "seconds"
    )
    assert table.select(expected.columns).equals(expected)
    write_spec(tmp_path, **content)
    assert "1 cell: 0 done before, 1 replayed" in run_sim("sweep", spec, "--jobs", 1)[2]


def test_a_cap_and_a_budget_of_one_amount_are_cells_of_their_own(asked, tmp_path, run_sim):
    spec, (paths, *_) = asked
    write_spec(
        tmp_path, traces=paths[:1], policies=["rkv"], budgets=["40%", "40%!"], parameters={"buffer": [4]}
    )
    assert run_sim("sweep", spec, "--jobs", 1, "-q")[0] == 0
    kept, capped = SweepFolder(tmp_path / "out").table().iter_rows(named=True)
    assert (kept["budget_kind"], capped["budget_kind"]) == ("kept", "peak")
    assert (kept["entries_peak"], capped["entries_peak"]) == (
        kept["budget_entries"] + 4,
        kept["budget_entries"],
    )
    code, out, _ = run_sim("results", tmp_path / "out", "--budget", "40%!", "--format", "csv")
    assert code == 0
    assert pl.read_csv(out.encode())["cell"].to_list() == [capped["cell"]]
    out = run_sim("results", tmp_path / "out", "--metric", "mass_mean")[1]
    assert "40%  " in out
    assert "40%!" in out


def test_what_is_done_is_not_done_again(asked, tmp_path, run_sim):
    spec, _ = asked
    assert run_sim("sweep", spec, "--jobs", 1)[0] == 0
    before = SweepFolder(tmp_path / "out").table()
    code, _, err = run_sim("sweep", spec, "--jobs", 1)
    assert code == 0
    assert "12 cells: 12 done before, 0 replayed in 0.0 s" in err
    assert SweepFolder(tmp_path / "out").table().equals(before)  # with the seconds of the first time
    assert run_sim("sweep", spec, "--jobs", 1, "-q") == (0, "", "")


def test_a_truncated_part_is_redone_alone(asked, tmp_path, run_sim):
    spec, _ = asked
    run_sim("sweep", spec, "--jobs", 1)
    before = table_of(tmp_path / "out")
    part = parts_of(tmp_path / "out")[0]
    n_rows = len(pl.read_parquet(part))
    part.write_bytes(part.read_bytes()[:-20])
    assert run_sim("sweep", spec, "--dry-run")[1] == (
        f"12 cells of 2 traces: {12 - n_rows} done, {n_rows} to replay\n"
    )
    code, _, err = run_sim("sweep", spec, "--jobs", 1)
    assert code == 0
    assert f"{part} is damaged and is dropped" in err
    assert f"{12 - n_rows} done before, {n_rows} replayed" in err
    assert table_of(tmp_path / "out").equals(before)


def test_a_folder_gives_the_rows_of_the_last_sweep_and_keeps_the_others(asked, tmp_path, run_sim):
    spec, (paths, policies, _) = asked
    run_sim("sweep", spec, "--jobs", 1)
    first = table_of(tmp_path / "out")
    other = write_spec(tmp_path, traces=paths[::-1], policies=policies[1:], budgets=["40%", 13])
    assert "8 cells: 4 done before, 4 replayed" in run_sim("sweep", other, "--jobs", 1)[2]
    table = table_of(tmp_path / "out")
    assert (
        table["trace"].unique(maintain_order=True).to_list()
        == first["trace"].unique(maintain_order=True).to_list()[::-1]
    )
    assert table["budget_asked"].to_list() == [40.0, 13.0] * 4
    write_spec(tmp_path, traces=paths, policies=policies, budgets=[12, "40%"])
    assert "12 cells: 12 done before, 0 replayed" in run_sim("sweep", spec, "--jobs", 1)[2]
    assert table_of(tmp_path / "out").equals(first)


def test_other_code_has_every_cell_replayed_again(asked, tmp_path, run_sim, monkeypatch):
    spec, _ = asked
    run_sim("sweep", spec, "--jobs", 1)
    for module in (cells, grid, worker):
        monkeypatch.setattr(module, "code_version", lambda: "other")
    monkeypatch.setattr("simulator.sweep.run.code_version", lambda: "other")
    assert "12 cells: 0 done before, 12 replayed" in run_sim("sweep", spec, "--jobs", 1)[2]
    assert SweepFolder(tmp_path / "out").table()["code_version"].unique().to_list() == ["other"]


def test_a_failing_cell_is_recorded_and_replayed_again_next_time(make_trace, tmp_path, run_sim):
    (tmp_path / "slow.py").write_text(SLOW_POLICY)
    spec = write_spec(
        tmp_path,
        traces=[str(make_trace().path)],
        budgets=[12, 3],
        policies=["rkv:buffer=5", f"{tmp_path}/slow.py:Slow:number=-1,milliseconds=0,buffer=5"],
    )
    for n_before in (0, 1):
        code, _, err = run_sim("sweep", spec, "--jobs", 1)
        assert code == 1
        said = err.splitlines()
        assert f"4 cells: {n_before} done before, {4 - n_before} replayed" in said[0]
        assert said[0].endswith("3 failed")
        assert "rkv at 3: budget 3 entries per KV head is too small" in said[1]
        assert "scorer 'slow' raised ValueError: below zero" in err
    table = SweepFolder(tmp_path / "out").table()
    assert table["status"].to_list() == ["ok", "error", "error", "error"]


def test_if_every_cell_fails_the_exit_code_is_the_failures_own(make_trace, tmp_path, run_sim):
    spec = write_spec(tmp_path, traces=[str(make_trace().path)], policies=["rkv"], budgets=[3])
    assert run_sim("sweep", spec, "--jobs", 1)[0] == 5


def test_a_bug_in_a_cell_is_recorded_and_the_rest_go_on(asked, tmp_path, run_sim, monkeypatch):
    plain = cells.PreparedTrace.replay

    def replay(self, policy, budget, **options):
        if policy.name == "rkv" and budget.amount == 12:
            raise ZeroDivisionError("by\nzero")
        return plain(self, policy, budget, **options)

    monkeypatch.setattr(cells.PreparedTrace, "replay", replay)
    assert run_sim("sweep", asked[0], "--jobs", 1)[0] == 1
    table = SweepFolder(tmp_path / "out").table().filter(status="error")
    assert table["error"].unique().to_list() == ["ZeroDivisionError: by zero"]
    assert len(table) == 2


def test_a_bad_trace_costs_its_own_cells_alone(make_trace, tmp_path, run_sim):
    traces = [make_trace() for _ in range(4)]
    (traces[0].path / "manifest.json").write_text("{")
    damaged = traces[1].path / "layer_001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    prompt_only = make_trace(n_tokens=20, prompt_tokens=20)
    paths = [str(trace.path) for trace in (*traces[:3], prompt_only, traces[3])]
    spec = write_spec(tmp_path, traces=paths, policies=["rkv:buffer=5", "fullkv"], budgets=[12])
    code, _, err = run_sim("sweep", spec, "--jobs", 1)
    assert code == 1
    assert "10 cells: 0 done before, 10 replayed" in err
    table = SweepFolder(tmp_path / "out").table()
    assert table["status"].to_list() == ["error"] * 4 + ["ok"] * 2 + ["error"] * 2 + ["ok"] * 2
    reasons = table.filter(status="error")["error"].unique(maintain_order=True).to_list()
    assert "manifest.json: not valid JSON" in reasons[0]
    assert "sha256" in reasons[1]
    assert "has no decode step after its prompt" in reasons[2]
    assert table["trace"].null_count() == 0
    assert run_sim("results", tmp_path / "out", "--metric", "mass_mean")[0] == 0
    # Mended, it is one of the sweep again.
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert "10 cells: 4 done before, 6 replayed" in run_sim("sweep", spec, "--jobs", 1)[2]
    assert SweepFolder(tmp_path / "out").table()["status"].to_list()[2:6] == ["ok"] * 4


def test_a_file_that_a_policy_reads_may_not_change_under_way(make_trace, tmp_path):
    trace, table = make_trace(), tmp_path / "heads.json"
    table.write_text("[[1, 2], [3, 4]]")
    policy = f"rkv+headkv:head_table={table},buffer=5"
    spec = read_spec(write_spec(tmp_path, traces=[str(trace.path)], policies=[policy], budgets=[12, 14]))
    change = "[[4, 3], [2, 1]]"
    progress = run_sweep(spec, tmp_path / "out", on_progress=lambda _: table.write_text(change))
    assert (progress.n_failed, progress.exit_code) == (2, 2)
    assert "another file than when the sweep began" in SweepFolder(tmp_path / "out").table()["error"][0]


def test_workers_of_another_version_refuse(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "code_version", lambda: "older")
    progress = run_sweep(read_spec(asked[0]), tmp_path / "out")
    assert progress.n_failed == 12
    assert "the worker runs code older; the sweep needs" in SweepFolder(tmp_path / "out").table()["error"][0]


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(asked, tmp_path, run_sim, monkeypatch):
    spec, _ = asked
    run_sim("sweep", spec, "--jobs", 1, "--out", tmp_path / "calm")
    plain, n_calls = cells.PreparedTrace.replay, [0]

    def replay(self, *arguments, **options):
        n_calls[0] += 1
        if n_calls[0] == 6:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    monkeypatch.setattr(cells.PreparedTrace, "replay", replay)
    out = tmp_path / "out"
    code, _, err = run_sim("sweep", spec, "--jobs", 1)
    assert (code, err) == (
        130,
        f"sim: interrupted: run the same command again: 1 of 12 cells are done in {out}\n",
    )
    assert len(list((out / "parts").iterdir())) == 1
    monkeypatch.undo()
    assert run_sim("sweep", spec, "--jobs", 1)[0] == 0
    assert table_of(out).equals(table_of(tmp_path / "calm"))


@pytest.mark.slow
def test_processes_give_the_same_bits_and_bring_users_files_along(asked, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_POLICY)
    spec = write_spec(
        tmp_path,
        traces=asked[1][0],
        policies=["reasonalloc:buffer=5,delta=1", "random:buffer=5", f"{tmp_path}/slow.py:Slow:buffer=5"],
        budgets=[12, "40%"],
        waves=[str(tmp_path / "wave.json")],
    )
    make_wave(open_trace(asked[1][0][0]), [1.0, 2.0]).write(tmp_path / "wave.json")
    for jobs in (1, 2):
        assert run_sweep(read_spec(spec), tmp_path / f"{jobs}", jobs=jobs).exit_code == 0
    assert table_of(tmp_path / "1").equals(table_of(tmp_path / "2"))


def test_seeds_are_rows_of_their_own_and_one_trace_in_comparisons(make_trace, tmp_path, run_sim):
    paths = [str(make_trace().path) for _ in range(2)]
    spec = write_spec(
        tmp_path, traces=paths, policies=["random:buffer=5", "rkv:buffer=5"], budgets=[12], seeds=[0, 1, 2]
    )
    assert run_sim("sweep", spec, "--jobs", 1)[0] == 0
    table = read_rows([tmp_path / "out"])
    assert table["seed"].to_list() == [0, 1, 2] * 4
    means = comparable(table)
    assert len(means) == 4
    random = table.filter(policy="random")["mass_mean"].to_list()
    assert means.filter(policy="random")["mass_mean"].to_list() == pytest.approx(
        [sum(random[:3]) / 3, sum(random[3:]) / 3]
    )
    for arguments in ((), ("--metric", "mass_mean")):
        code, out, _ = run_sim("results", tmp_path / "out", *arguments)
        assert code == 0
        assert "2 traces" in out


@pytest.mark.slow
def test_results_read_filter_and_export_folders_and_files(asked, tmp_path, run_sim):
    spec, (paths, *_) = asked
    run_sim("sweep", spec, "--jobs", 1)
    out, rows = tmp_path / "out", tmp_path / "rows.parquet"
    run_sim("replay", "--trace", paths[0], "--policy", "snapkv:buffer=5", "--budget", 12, "-o", rows)
    both = read_rows([out, rows])
    assert len(both) == 13
    assert both["cell"].null_count() == 1
    for options, wanted in (
        (["--budget", "40%"], pl.col("budget_unit") == "%"),
        (["--budget", "12,40%"], pl.lit(True)),
        (["--trace", "made-1"], pl.col("trace") == "made-1.kvtrace"),
        (["--trace", "made-*"], pl.lit(True)),
        (["--policy", "rkv", "--family", "f60"], (pl.col("policy") == "rkv") & (pl.col("family") == "f60")),
    ):
        for suffix, read in (("parquet", pl.read_parquet), ("json", pl.read_json), ("csv", pl.read_csv)):
            file = tmp_path / f"chosen.{suffix}"
            assert run_sim("results", out, *options, "-o", file)[0] == 0
            expected = read_rows([out]).filter(wanted)
            assert read(file)["cell"].to_list() == expected["cell"].to_list()
    for options, message in (
        (["--budget", "41%"], "--budget is '41%'; the rows have: 12, 40%"),
        (["--trace", "other"], "--trace is 'other'; the rows have: made-0.kvtrace, made-1.kvtrace"),
        (["--budget", "x"], "budget 'x' is not a budget"),
    ):
        code, _, err = run_sim("results", out, *options)
        assert code == 2
        assert message in err


def test_an_unfinished_sweep_gives_the_rows_it_has(asked, tmp_path):
    spec = read_spec(asked[0])
    run_sweep(spec, tmp_path / "out")
    before = table_of(tmp_path / "out")
    part = parts_of(tmp_path / "out")[1]
    gone = set(pl.read_parquet(part)["cell"])
    part.unlink()
    assert table_of(tmp_path / "out").equals(before.filter(~pl.col("cell").is_in(list(gone))))


def test_a_trace_is_prepared_once_for_many_tasks(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_FIRST_CELLS", 1)
    monkeypatch.setattr(tasks, "_TASK_SECONDS", 0.0)
    prepared = []
    plain = worker.PreparedTrace
    monkeypatch.setattr(
        worker,
        "PreparedTrace",
        lambda trace, **options: prepared.append(trace.path) or plain(trace, **options),
    )
    run_sweep(read_spec(asked[0]), tmp_path / "out")
    assert len(parts_of(tmp_path / "out")) == 12
    assert len(prepared) == len(set(prepared)) == 2
