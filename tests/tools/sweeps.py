"""Small sweeps that several tests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from places import ROOT

from simulator.sweep.folder import SweepFolder

# A policy whose cells take as long as the test wants.
SLOW_POLICY = '''
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer


@dataclass(frozen=True)
class Slow(Scorer):
    """Take a while.

    Attributes
    ----------
    milliseconds : int
        Of sleep whenever a layer is scored.
    number : int
        Tells cells apart.
    """

    name: ClassVar[str] = "slow"
    milliseconds: int = 5
    number: int = 0

    def score(self, view):
        time.sleep(self.milliseconds / 1000)
        if self.number < 0:
            raise ValueError("below zero")
        return np.linalg.norm(view.keys, axis=-1)
'''


def write_spec(folder: Path, **content) -> Path:
    """Write a spec of top-level keys; a mapping becomes a table, a list of mappings an array of tables."""
    content = {"out": str(folder / "out")} | content
    path = folder / "spec.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in content.items()), encoding="utf-8")
    return path


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(inner)}' for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f"'{value}'"


def table_of(out: Path):
    """Rows of a sweep but for what differs between equal runs."""
    return SweepFolder(out).table().drop("seconds")


def start_sweep(spec: Path, *options) -> subprocess.Popen:
    """Start ``sim sweep`` as the leader of a process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "validate.cli.main", "sweep", str(spec), *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def parts_of(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("part-*.parquet"))


def wait_for_parts(sweep: subprocess.Popen, out: Path, more_than: int) -> None:
    """Wait until a sweep has written more parts, or ended."""
    while sweep.poll() is None and len(parts_of(out)) <= more_than:
        time.sleep(0.01)


def kill(sweep: subprocess.Popen) -> bool:
    """Kill the leader alone, as a user or the system would; False if it had ended by itself."""
    was_running = sweep.poll() is None
    if was_running:
        os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    return was_running


def wait_for_group(group: int, seconds: float) -> bool:
    """Wait until no process of a group is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
