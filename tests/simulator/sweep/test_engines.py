"""Engines: how they are asked for, and that a cluster gives the table of one process, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sweeps import ROOT, SLOW_POLICY, start_sweep, table_of, write_spec

from simulator.sweep.run import run_sweep
from simulator.sweep.spec import read_spec
from simulator.workers.engines import Engine, connected, parse_engine
from traces.errors import UserError


def test_engines_are_read():
    assert parse_engine("local") == Engine()
    assert parse_engine("dask://host:8786") == Engine("dask", "tcp://host:8786")
    assert parse_engine("ray") == parse_engine("ray://auto") == Engine("ray", "auto")
    assert parse_engine("ray://host:10001") == Engine("ray", "ray://host:10001")


@pytest.mark.parametrize("text", ["spark", "dask", "dask://", "tcp://a:1", "ray://a b", ""])
def test_other_engines_are_refused(text):
    with pytest.raises(UserError, match=f"--engine is '{text}'; allowed: local, dask://HOST:PORT"):
        parse_engine(text)


@pytest.mark.parametrize(("engine", "package"), [("dask://a:1", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_one_line_with_the_remedy(engine, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(UserError, match=rf"needs {package}, .* pip install 'kvbudget\[cluster\]'"),
        connected(parse_engine(engine), 1),
    ):
        pass


@pytest.mark.slow
def test_the_sweep_loads_no_cluster_library():

    code = (
        "import sys, simulator.sweep.run; print({'dask', 'distributed', 'ray', 'fsspec'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


@pytest.fixture
def spec(make_trace, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_POLICY)
    bad = make_trace()
    (bad.path / "layer_000.safetensors").write_bytes(b"")
    return write_spec(
        tmp_path,
        traces=[*(str(make_trace().path) for _ in range(2)), str(bad.path)],
        policies=["fullkv", "reasonalloc:delta=1", "random", f"{tmp_path}/slow.py:Slow:milliseconds=0"],
        budgets=[12, 13, "30%", "40%"],
        parameters={"buffer": [5]},
    )


def require_the_table_of_one_process(spec, tmp_path, engine):
    ran = start_sweep(spec, "--engine", engine)
    _, said = ran.communicate(timeout=100)
    assert ran.returncode == 1, said
    assert said.startswith("sim: 48 cells: 0 done before, 48 replayed in ")
    run_sweep(read_spec(spec), tmp_path / "local")
    found = table_of(tmp_path / "out")
    assert found.equals(table_of(tmp_path / "local"))
    n_failed = found["status"].to_list().count("error")
    assert 16 <= n_failed <= 24  # those of the bad trace, and budgets too small for a policy
    assert said.splitlines()[0].endswith(f" {n_failed} failed")


@pytest.mark.cluster
def test_a_dask_cluster_gives_the_same_table(spec, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        require_the_table_of_one_process(spec, tmp_path, address)


@pytest.mark.cluster
def test_a_local_ray_gives_the_same_table(spec, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        monkeypatch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        require_the_table_of_one_process(spec, tmp_path, "ray")
    finally:
        ray.shutdown()


@pytest.mark.cluster
def test_no_cluster_is_one_line(monkeypatch):
    pytest.importorskip("distributed")
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for engine, said in (
        ("dask://127.0.0.1:1", "no Dask scheduler answers"),
        ("ray", "no Ray answers at auto: .*refused"),
    ):
        with pytest.raises(UserError, match=said), connected(parse_engine(engine), 1):
            pass
