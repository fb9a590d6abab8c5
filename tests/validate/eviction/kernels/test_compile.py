"""The kernels compile for an H100, also where there is none: the interpreter lets more pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from places import TESTS

pytest.importorskip("triton")

KERNELS = {
    "_attend_split": ["bf16", "fp32", "fp16"],
    "_merge_splits": ["fp32"],
    "_append": ["bf16", "fp32"],
    "_sum_exponentials": ["bf16", "fp32"],
    "_write_means": ["bf16", "fp32"],
    "_sum_directions": ["bf16", "fp32"],
    "_find_newest": ["bf16", "fp32"],
    "_compare_newest": ["bf16", "fp32"],
    "_write_exponentials": ["bf16", "fp32"],
    "_normalise": ["fp32"],
    "_combine": ["fp32"],
    "_select": ["fp32"],
    "_demand": ["fp32"],
    "_compact": ["i32"],
    "_fill": ["bf16"],
}
# Bytes of shared memory that one program can have on an H100.
MOST_SHARED = 227 * 1024


@pytest.fixture(scope="module")
def compiled(machine_code):
    """Give what every launch was compiled to, in a process of its own: an interpreter has no compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(machine_code("triton"))}
    command = [sys.executable, str(TESTS / "tools" / "compile_launches.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def ptx_of(compiled, kernel, dtype):
    return [one["ptx"] for one in compiled if (one["kernel"], one["dtype"]) == (kernel, dtype)]


@pytest.mark.slow
def test_every_launch_compiles_for_hopper(compiled):
    expected = {(kernel, dtype) for kernel, dtypes in KERNELS.items() for dtype in dtypes}
    assert {(one["kernel"], one["dtype"]) for one in compiled} == expected
    assert all(one["shared"] <= MOST_SHARED for one in compiled)


@pytest.mark.slow
def test_keys_are_on_their_way_while_tensor_cores_are_busy(compiled):
    for ptx in ptx_of(compiled, "_attend_split", "bf16"):
        assert "cp.async.cg" in ptx
        assert "mma.sync.aligned.m16n8k16" in ptx
    assert all("cp.async.cg" in ptx for ptx in ptx_of(compiled, "_attend_split", "fp32"))


@pytest.mark.slow
def test_threads_wait_between_loads_and_stores_of_a_move(compiled):
    for ptx in ptx_of(compiled, "_compact", "i32"):
        moves = re.findall(r"ld\.global\.v4|st\.global\.v4|bar\.sync", ptx)
        assert "ld.global.v4" in moves
        for before, after in pairwise(moves):
            assert {before, after} != {"ld.global.v4", "st.global.v4"}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_select", "_demand"])
def test_the_sign_of_zero_is_dropped_before_bits_are_compared(compiled, kernel):
    # As a comparison of floats, or by clearing the bit, whichever a version of Triton chooses.
    dropped = re.compile(r"setp\.eq\.f32|and\.b32.*, 2147483647;")
    assert all(dropped.search(ptx) for ptx in ptx_of(compiled, kernel, "fp32"))
