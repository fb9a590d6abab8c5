"""Fixtures that most tests share: seeded numbers and tiny traces."""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from traces import write_trace
from validate.cli import main as cli

with suppress(ImportError):
    # Before any test imports triton: only then can it be told that there is no GPU.
    import gpu_device  # noqa: F401


@pytest.fixture(autouse=True)
def _no_word_of_the_machine(monkeypatch):
    """Keep what ``sim`` says of a slow BLAS out of the tests, wherever they run; see test_bench."""
    monkeypatch.setattr("simulator.workers.blas._CPUINFO", Path("no such file"))
    monkeypatch.setattr("simulator.workers.blas._loaded_threads", lambda: 1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260922)


@pytest.fixture
def make_trace(rng, tmp_path):
    """Write a small trace of Gaussian queries and keys, or of arrays that the test gives."""
    serial = count()

    def make(
        n_layers=2,
        n_kv_heads=2,
        group_size=2,
        n_tokens=60,
        head_dim=8,
        prompt_tokens=20,
        arrays=None,
        **options,
    ):
        if arrays is None:
            queries = rng.normal(size=(n_layers, n_kv_heads * group_size, n_tokens, head_dim))
            arrays = queries, rng.normal(size=(n_layers, n_kv_heads, n_tokens, head_dim))
        path = tmp_path / f"made-{next(serial)}.kvtrace"
        return write_trace(path, *arrays, prompt_tokens=prompt_tokens, **options)

    return make


@pytest.fixture
def run_sim(monkeypatch, capsys):
    """Run one command in this process; give exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Give a directory that outlives the examples of one property test."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="session")
def machine_code(request, tmp_path_factory):
    """Give a folder for machine code of one kind, which outlives the run where pytest keeps anything.

    Numba's for another processor has no place beside that for this one: two processes that compile a function
    for two processors may each store it under the name that the other has just put into the index.
    """
    kept = getattr(request.config, "cache", None)

    def folder(kind):
        return kept.mkdir(f"code-{kind}") if kept else tmp_path_factory.mktemp(kind)

    return folder
