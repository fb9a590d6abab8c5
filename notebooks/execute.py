"""Run the notebooks top to bottom and save them with their outputs.

``python notebooks/execute.py [NOTEBOOK ...]``, or ``make notebooks``; without names, all of them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HOME = Path(__file__).resolve().parent
# A cell that takes longer is stopped; all of a notebook take less than a minute on an idle machine.
LIMIT_SECONDS = 300


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel; the outputs it was saved with are dropped.

    Parameters
    ----------
    path : Path
    folder : Path
        Where the kernel runs: notebooks find what they need by package, not by place.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT_SECONDS,
        startup_timeout=LIMIT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    # The packages beside the notebooks, not others that may be installed.
    places = [str(HOME.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(places)})
    for cell in notebook.cells:
        cell.metadata.clear()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def main(names: list[str]) -> None:
    """Execute notebooks in place and say how long each took."""
    paths = [Path(name) for name in names] or sorted(HOME.glob("*.ipynb"))
    for path in paths:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1024
        print(f"{path.name}: {time.perf_counter() - started:.1f} s, {size:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
