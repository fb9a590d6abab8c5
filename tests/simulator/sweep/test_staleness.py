"""What is finished stays finished while only pages and charts change, and no longer than that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
from places import ROOT
from sweeps import write_spec

from traces import write_trace

# How a chart and a page look, what a command says, what is decoded live.
CHANGES_NO_ROW = [
    "simulator/charts/style.py",
    "simulator/report/page.py",
    "simulator/cli/replay.py",
    "validate/live/matrix.py",
]
CHANGES_ROWS = [
    "simulator/kernels/tiles.py",
    "simulator/policies/scorers/rkv.py",
    "simulator/engine/loop.py",
    "simulator/waves/*.json",
    "simulator/budget.py",
    "simulator/cells.py",
    "traces/trace.py",
]
FILES = [*CHANGES_NO_ROW, *CHANGES_ROWS]
# One process for all, since to start and to import takes longer than to look; each look reads the code anew.
LOOK = """
import io, json, sys
from contextlib import redirect_stdout
from pathlib import Path

from simulator.cells import code_version
from validate.cli import main as cli

files = sys.argv[1:]


def said(*options):
    sys.argv, out = ["sim", "sweep", "spec.toml", *options], io.StringIO()
    code_version.cache_clear()
    try:
        with redirect_stdout(out):
            cli.main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    return out.getvalue().strip()

assert Path(cli.__file__).is_relative_to(Path.cwd())
said("--jobs", "1", "--quiet")
found = {"before": said("--dry-run")}
for name in files:
    path = Path(name)
    before = path.read_bytes()
    path.write_bytes(before + (b"\\n" if path.suffix == ".json" else b"# changed\\n"))
    found[name] = said("--dry-run")
    path.write_bytes(before)
found["restored"] = said("--dry-run")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """Give what a finished sweep says there is to do, by the file that was changed since."""
    folder = tmp_path_factory.mktemp("code")
    # With the machine code beside the kernels, which need not be compiled again.
    for package in ("traces", "simulator", "validate"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("weights", "samples"))
    arrays = np.random.default_rng(1).normal(size=(2, 1, 2, 40, 8))
    write_trace(folder / "tiny.kvtrace", *arrays, prompt_tokens=20)
    write_spec(folder, traces=["tiny.kvtrace"], policies=["knorm:buffer=4"], budgets=[12, 16])
    names = [name for pattern in FILES for name in sorted(folder.glob(pattern))]
    ran = subprocess.run(
        [sys.executable, "-c", LOOK, *(str(name.relative_to(folder)) for name in names)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_finished_sweep_is_stale_where_what_makes_rows_has_changed_alone(looks, name):
    done, to_do = ("2 cells of 1 trace: 2 done, 0 to replay", "2 cells of 1 trace: 0 done, 2 to replay")
    assert [looks["before"], looks["restored"]] == [done, done]
    said = {looks[file] for file in looks if fnmatch(file, name)}
    assert said == {to_do if name in CHANGES_ROWS else done}
