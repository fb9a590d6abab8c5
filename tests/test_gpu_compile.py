"""The kernels compile for an H100, also where there is none: the interpreter lets more pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.curdir}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    root = SCRIPT.parent.parent
    done = subprocess.run(command, env=os.environ | own, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = {path.stem: path.read_text() for path in tmp_path.glob("*.ptx")}
    assert len(ptx) == 12
    # Keys and values are on their way while the tensor cores are busy with those before.
    assert "cp.async.cg" in ptx["attend_bfloat16"]
    assert "mma.sync.aligned.m16n8k16" in ptx["attend_bfloat16"]
    assert "cp.async.cg" in ptx["attend_float32"]
    # 16 bytes at once, and between loads and stores all threads wait.
    moves = re.findall(r"ld\.global\.v4|st\.global\.v4|bar\.sync", ptx["compact"])
    assert "ld.global.v4" in moves
    for before, after in pairwise(moves):
        assert {before, after} != {"ld.global.v4", "st.global.v4"}
    # The sign of zero is dropped before bits are compared.
    assert "setp.eq.f32" in ptx["select"]
    assert "setp.eq.f32" in ptx["demand"]
