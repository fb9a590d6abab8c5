"""Machine code on disk is not used once a file has changed that it was made of."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from numba import njit
from numba.core import event
from places import ROOT

from simulator.kernels.compiled import _Told, compiled

ASK = """
import numpy as np
from simulator.kernels.attention import add_tile_mass
from simulator.kernels.tiles import ROWS, WIDTH
mass = np.zeros(WIDTH, np.float32)
add_tile_mass(np.zeros((ROWS, WIDTH), np.float32), np.float32(1), np.zeros(WIDTH, np.float32), mass)
hits = sum(add_tile_mass.stats.cache_hits.values())
print(mass[0] == ROWS, hits)
"""


@pytest.mark.slow
def test_code_on_disk_is_used_until_a_file_changes(tmp_path):
    for package in ("traces", "simulator"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def ask():
        return subprocess.run(
            [sys.executable, "-c", ASK],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    assert ask() == ["True", "0"]
    assert ask() == ["True", "1"]
    tiles = tmp_path / "simulator/kernels/tiles.py"
    tiles.write_text(tiles.read_text().replace("return ", "return  "))
    assert ask() == ["True", "0"]


def test_a_terminal_is_told_once_that_something_is_compiled(monkeypatch, capsys):
    told = _Told()
    told.on_start(None)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    told.on_start(None)
    told.on_start(None)
    assert capsys.readouterr().err == "sim: compiling for this machine, once: some 20 seconds\n"


def test_machine_code_from_disk_is_not_told(tmp_path, monkeypatch):
    (tmp_path / "successor.py").write_text("def successor(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    successor = import_module("successor").successor
    starts = []

    class Noted(_Told):
        def on_start(self, event):
            starts.append(event)

    noted = Noted()
    event.register("numba:compile", noted)
    try:
        assert compiled()(successor)(1) == 2
        assert len(starts) == 1
        assert compiled()(successor)(1) == 2
    finally:
        event.unregister("numba:compile", noted)
    assert len(starts) == 1


def test_ctrl_c_waits_until_the_compiler_is_done():
    class Presses(event.Listener):
        went_on = False

        def on_start(self, event):
            signal.raise_signal(signal.SIGINT)
            self.went_on = True

        def on_end(self, event):
            pass

    made, presses = njit(lambda x: x + 1), Presses()
    with event.install_listener("numba:compile", presses), pytest.raises(KeyboardInterrupt):
        made(1)
    assert presses.went_on
    assert made(1) == 2
