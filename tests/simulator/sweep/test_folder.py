"""A sweep's folder: parts are whole or not there, and what is damaged is noticed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import polars as pl
import pytest
from sweeps import parts_of, write_spec

from simulator.sweep import folder as sweep_folder
from simulator.sweep.folder import OutputError, SweepFolder, is_sweep
from simulator.sweep.run import run_sweep
from simulator.sweep.spec import read_spec
from traces.errors import UserError


def row(cell, status="ok", **more):
    return {"cell": cell, "status": status, "policy": "p", "seed": 0, **more}


@pytest.fixture
def folder(tmp_path):
    found = SweepFolder(tmp_path / "out")
    with found.opened():
        yield found


def test_rows_come_back_as_they_were(folder):
    folder.write_part([row("a", mass_mean=0.1), row("b", mass_mean=1 / 3)])
    folder.write_part([row("c", "error", error="why")])
    rows = folder.read_rows().sort("cell")
    assert dict(rows.schema) == sweep_folder.ROWS
    assert rows["mass_mean"].to_list() == [0.1, 1 / 3, None]
    assert rows["error"].to_list() == [None, None, "why"]


def test_success_goes_before_failure_and_later_before_earlier(folder):
    folder.write_part([row("a", "error", error="first"), row("b"), row("c", "error", error="first")])
    folder.write_part([row("a"), row("b", "error"), row("c", "error", error="second")])
    rows = {own["cell"]: own for own in folder.read_rows().iter_rows(named=True)}
    assert [rows[cell]["status"] for cell in "abc"] == ["ok", "ok", "error"]
    assert rows["c"]["error"] == "second"


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "other bytes"])
def test_a_damaged_part_is_noticed_and_dropped(damage, folder, capsys):
    for cell in "abc":
        folder.write_part([row(cell)])
    part = parts_of(folder.path)[1]
    content = part.read_bytes()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 1
    part.write_bytes(
        {"empty": b"", "truncated": content[:-7], "one bit": bytes(middle), "other bytes": b"PAR1"}[damage]
    )
    assert set(folder.read_rows()["cell"]) == {"a", "c"}
    assert "is left out" in capsys.readouterr().err
    assert part.exists()
    assert set(folder.read_rows(drop_damaged=True)["cell"]) == {"a", "c"}
    said = capsys.readouterr().err
    assert said == f"sim: {part} is damaged and is dropped; its cells are replayed again\n"
    assert not part.exists()


def test_half_written_files_of_a_killed_run_are_cleared(tmp_path):
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    stale = [out / ".cells.parquet.part", out / "parts" / ".part-000001-0123456789abcdef.parquet.part"]
    for path in stale:
        path.write_bytes(b"half")
    (out / "parts" / "notes.txt").write_text("mine")
    with SweepFolder(out).opened():
        assert not any(path.exists() for path in stale)
    assert (out / "parts" / "notes.txt").exists()


@pytest.mark.slow
def test_one_sweep_at_a_time(folder):
    other = (
        "from pathlib import Path; from simulator.sweep.folder import SweepFolder\n"
        f"with SweepFolder(Path({str(folder.path)!r})).opened(): pass"
    )
    ran = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert ran.stderr.splitlines()[-1].endswith(
        f"{folder.path}: another sweep is writing there; allowed: one at a time, or another --out"
    )


def test_the_lock_ends_with_its_holder(tmp_path):
    for _ in range(2):
        with SweepFolder(tmp_path / "out").opened():
            pass


def test_many_parts_become_one(folder, monkeypatch):
    monkeypatch.setattr(sweep_folder, "_MANY_PARTS", 4)
    for number in range(5):
        folder.write_part([row(str(number)), row("again", "error")])
    before = folder.read_rows().sort("cell")
    folder.compact()
    assert len(parts_of(folder.path)) == 1
    assert folder.read_rows().sort("cell").equals(before)
    folder.write_part([row("later")])
    assert len(folder.read_rows()) == len(before) + 1
    folder.compact()
    assert len(parts_of(folder.path)) == 2


def test_a_folder_of_another_kind_is_refused(tmp_path, run_sim):
    assert not is_sweep(tmp_path)
    code, _, err = run_sim("results", tmp_path)
    assert (code, err) == (
        2,
        f"sim: {tmp_path}: no sweep was started there; allowed: a folder of sim sweep, or files\n",
    )
    (tmp_path / "cells.parquet").write_bytes(b"PAR1")
    assert "is damaged or no parquet file; run sim sweep again" in run_sim("results", tmp_path)[2]


@pytest.fixture
def small_sweep(make_trace, tmp_path):
    path = str(make_trace().path)
    return write_spec(tmp_path, traces=[path], policies=["rkv:buffer=5"], budgets=list(range(12, 24)))


def test_a_full_disk_is_one_line_and_the_sweep_goes_on_later(small_sweep, tmp_path, run_sim, monkeypatch):
    calm = tmp_path / "calm"
    assert run_sim("sweep", small_sweep, "--jobs", 1, "--out", calm)[0] == 0
    write, room = Path.write_bytes, [2]  # the list of cells and one part

    def write_while_room(path, content):
        if not room[0]:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_while_room)
    code, _, err = run_sim("sweep", small_sweep, "--jobs", 1)
    out = tmp_path / "out"
    assert (code, err) == (
        1,
        f"sim: {out} cannot be written: No space left on device; 1 of 12 cells are done in {out}; once "
        "that is mended, run the same command again\n",
    )
    assert [path.name for path in (out / "parts").iterdir()] == [parts_of(out)[0].name]
    monkeypatch.undo()
    assert run_sim("sweep", small_sweep, "--jobs", 1)[0] == 0
    tables = [SweepFolder(path).table().drop("seconds") for path in (out, calm)]
    assert tables[0].equals(tables[1])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(small_sweep, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        filling = disk / "filling"
        filling.write_bytes(bytes(shutil.disk_usage(disk).free - 30_000))  # the list of cells and a part
        spec = read_spec(small_sweep)
        with pytest.raises(OutputError, match=r"No space left on device; \d+ of 12 cells are done"):
            run_sweep(spec, disk / "out")
        assert not list((disk / "out").rglob(".*.part"))
        filling.unlink()
        progress = run_sweep(spec, disk / "out")
        assert 0 < progress.n_before < 12
        assert progress.n_done == 12
        run_sweep(spec, tmp_path / "calm")
        tables = [SweepFolder(path).table().drop("seconds") for path in (disk / "out", tmp_path / "calm")]
        assert tables[0].equals(tables[1])
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written: Not a directory"),
        SweepFolder(tmp_path / "file" / "out").opened(),
    ):
        pass


def test_rows_of_versions_with_other_columns_are_read_over(folder):
    folder.write_part([row("a")])
    path = parts_of(folder.path)[0]
    pl.read_parquet(path).drop("gap").write_parquet(path)
    path.rename(path.with_name(f"part-000001-{sha256(path.read_bytes()).hexdigest()[:16]}.parquet"))
    folder.write_part([row("b", gap=0.5)])
    assert folder.read_rows().sort("cell")["gap"].to_list() == [None, 0.5]


def test_no_list_of_cells_is_said(tmp_path):
    with pytest.raises(UserError, match="No such file or directory; run sim sweep again"):
        SweepFolder(tmp_path).table()
