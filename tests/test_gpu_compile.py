"""Kernels compile for a GPU, whether or not there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
KERNELS = ["_sum_exponentials", "_write_means", "_sum_directions", "_find_newest", "_compare_newest"]
KERNELS += ["_write_exponentials", "_normalise"]


@pytest.mark.slow
def test_every_launch_compiles_for_hopper(tmp_path):
    # In a process of its own: where kernels are interpreted, triton has no compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(TESTS / "compile_launches.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    compiled = [line.split()[:-1] for line in ended.stdout.splitlines()]
    expected = [[kernel, dtype] for dtype in ("*fp32", "*bf16") for kernel in KERNELS]
    # The last has no keys.
    expected = [pair[:1] if pair[0] == "_normalise" else pair for pair in expected]
    assert compiled == [*expected, ["_combine"], ["_combine"]]
    # A multiprocessor has 227 KiB of shared memory.
    assert max(int(line.split()[-1]) for line in ended.stdout.splitlines()) <= 227 * 1024
