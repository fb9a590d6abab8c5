"""A sweep that is killed goes on where it was; see kill_sweep.py for many kills of a real one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from sweeps import (
    ROOT,
    SLOW_POLICY,
    kill,
    parts_of,
    start_sweep,
    table_of,
    wait_for_group,
    wait_for_parts,
    write_spec,
)

from simulator.sweep.run import run_sweep
from simulator.sweep.spec import read_spec

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups")
N_CELLS = 24


@pytest.fixture
def slow_spec(make_trace, tmp_path):
    """Give a sweep of 24 cells of some 60 ms, whatever the machine."""
    (tmp_path / "slow.py").write_text(SLOW_POLICY)
    paths = [str(make_trace(n_layers=1, n_kv_heads=1).path) for _ in range(3)]
    slow = {
        "policy": f"{tmp_path}/slow.py:Slow:milliseconds=10,buffer=7",
        "parameters": {"number": [0, 1]},
    }
    return write_spec(tmp_path, traces=paths, grid=[slow], budgets=[12, 14, "40%", "50%"])


@pytest.mark.slow
def test_a_sweep_killed_at_random_ends_with_the_rows_of_an_undisturbed_one(slow_spec, tmp_path):
    rng = random.Random(1)
    out = tmp_path / "out"
    for n_kills in range(3):
        sweep = start_sweep(slow_spec, "--jobs", 1)
        wait_for_parts(sweep, out, more_than=n_kills)
        time.sleep(rng.uniform(0, 0.2))
        assert kill(sweep)
        assert parts_of(out)
    said = start_sweep(slow_spec, "--jobs", 1).communicate()[1]
    assert f"sim: {N_CELLS} cells: " in said
    assert ": 0 done before" not in said
    run_sweep(read_spec(slow_spec), tmp_path / "calm")
    found = table_of(out)
    assert len(found) == found["cell"].n_unique() == N_CELLS
    assert found.equals(table_of(tmp_path / "calm"))
    assert not list(out.rglob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGKILL", "SIGINT"])
def test_workers_end_with_their_sweep(way, slow_spec, tmp_path):
    out = tmp_path / "out"
    sweep = start_sweep(slow_spec, "--jobs", 2)
    wait_for_parts(sweep, out, more_than=0)
    if way == "SIGKILL":
        assert kill(sweep)
    else:
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, said = sweep.communicate(timeout=20)
        assert sweep.returncode == 130
        assert said.startswith("sim: interrupted: run the same command again: ")
        assert said.endswith(f" of {N_CELLS} cells are done in {out}\n")
        assert said.count("\n") == 1
        assert not list(out.rglob(".*.part"))
    assert wait_for_group(sweep.pid, seconds=20)
    assert 0 < len(table_of(out)) < N_CELLS


@pytest.mark.slow
def test_a_second_sweep_of_the_same_folder_is_refused(slow_spec, tmp_path, run_sim):
    sweep = start_sweep(slow_spec, "--jobs", 1)
    wait_for_parts(sweep, tmp_path / "out", more_than=0)
    code, _, err = run_sim("sweep", slow_spec, "--jobs", 1)
    assert kill(sweep)
    assert (code, err.count("\n")) == (2, 1)
    assert "another sweep is writing there" in err


@pytest.mark.slow
def test_a_worker_that_dies_is_said_in_one_line(make_trace, tmp_path):
    code = SLOW_POLICY.replace("time.sleep(self.milliseconds / 1000)", "__import__('os')._exit(9)")
    (tmp_path / "slow.py").write_text(code)
    spec = write_spec(
        tmp_path,
        traces=[str(make_trace().path)],
        policies=["rkv:buffer=7", f"{tmp_path}/slow.py:Slow:buffer=7"],
        budgets=[12, 13, 14, 15],
    )
    ran = subprocess.run(
        [sys.executable, "-m", "validate.cli.main", "sweep", str(spec), "--jobs", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith(
        "sim: a worker process was killed, perhaps for want of memory; run the same "
    )
    assert ran.stderr.count("\n") == 1
