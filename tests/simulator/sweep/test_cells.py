"""Cells under their addresses, dealt out in portions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from agreement import make_wave
from sweeps import SLOW_POLICY, write_spec

from simulator.budget import parse_budget
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.policies.language import parse_policy
from simulator.sweep import grid, tasks
from simulator.sweep.grid import SweepTrace, TraceCells, find_sweep_traces, lay_out, wave_digest
from simulator.sweep.run import plan_sweep
from simulator.sweep.spec import Setting, read_spec
from simulator.sweep.tasks import Portions
from traces.errors import TraceError

TRACE = SweepTrace("/a/t.kvtrace", "t.kvtrace", trace_id="0" * 64)
SETTING = Setting(parse_policy("rkv"), parse_budget("20%"), 0)


def address(trace=TRACE, setting=SETTING, waves=(), sampling=EVERYTHING):
    (own,) = lay_out([trace], [setting], waves, sampling)
    return own.cells[0].key


def test_the_same_cell_has_the_same_address_wherever_the_trace_lies():
    assert address() == address(replace(TRACE, source="s3://b/u.kvtrace", name="u.kvtrace", n_bytes=7))


def test_everything_a_row_depends_on_is_in_its_address(monkeypatch):
    found = [
        address(),
        address(replace(TRACE, trace_id="1" * 64)),
        address(setting=replace(SETTING, policy=parse_policy("snapkv"))),
        address(setting=replace(SETTING, policy=parse_policy("rkv:alpha=0.2"))),
        address(setting=replace(SETTING, policy=parse_policy("rkv:trigger=every-n"))),
        address(setting=replace(SETTING, budget=parse_budget("21%"))),
        address(setting=replace(SETTING, budget=parse_budget("20"))),
        address(setting=replace(SETTING, seed=1)),
        address(waves=["a wave"]),
        address(waves=["another wave"]),
        address(sampling=Sampling(kv_heads=2)),
    ]
    monkeypatch.setattr(grid, "code_version", lambda: "other code")
    found.append(address())
    assert len(set(found)) == len(found)


def test_an_edited_file_of_the_users_gives_other_addresses(tmp_path, make_trace):
    path = tmp_path / "mine.py"
    spec = write_spec(
        tmp_path, traces=[str(make_trace().path)], policies=[f"{path}:Slow", "rkv"], budgets=[12]
    )
    keys = []
    for code in (SLOW_POLICY, SLOW_POLICY + "\n# edited\n"):
        path.write_text(code)
        keys.append([cell.key for cell in plan_sweep(read_spec(spec))[0].cells])
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]


def test_a_wave_is_named_by_its_content(make_trace, tmp_path):
    trace = make_trace()
    digests = []
    for name, demand in (("a", [1.0, 2.0]), ("b", [1.0, 2.0]), ("c", [2.0, 1.0])):
        make_wave(trace, demand).write(tmp_path / name)
        digests.append(wave_digest(str(tmp_path / name)))
    assert digests[0] == digests[1] != digests[2]


def test_traces_come_in_the_order_asked_and_each_content_once(make_trace, tmp_path):
    first, second = make_trace(), make_trace()
    (tmp_path / "copy.kvtrace").symlink_to(first.path)
    found = find_sweep_traces([str(second.path), str(first.path), str(tmp_path)])
    assert [trace.name for trace in found] == [second.path.name, first.path.name]
    with pytest.raises(TraceError, match="matches no trace"):
        find_sweep_traces([str(tmp_path / "nothing*")])


def work_of(*sizes, n_bytes=1000):
    return [
        TraceCells(
            SweepTrace(f"/{i}.kvtrace", f"{i}", trace_id=str(i), n_bytes=n_bytes),
            lay_out([TRACE], [replace(SETTING, seed=seed) for seed in range(size)], ())[0].cells,
        )
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("n_workers", [1, 2, 5])
@pytest.mark.parametrize("seconds", [0.0, 1e-4, 0.5, 100.0])
def test_portions_deal_every_cell_once_and_in_order(n_workers, seconds):
    work = work_of(100, 0, 7, 1, 30)
    portions = Portions(work, n_workers)
    dealt = {own.trace.name: [] for own in work}
    for own in portions:
        assert 1 <= len(own.cells) <= 64
        if seconds > 4:
            assert len(own.cells) <= 4
        dealt[own.trace.name] += own.cells
        portions.learn(own.trace, len(own.cells), seconds * len(own.cells))
    assert dealt == {own.trace.name: list(own.cells) for own in work}


def test_portions_are_a_few_seconds_long_once_that_is_known():
    small, large = work_of(500)[0], work_of(500, n_bytes=10_000)[0]
    portions = Portions([small, replace(large, trace=replace(large.trace, trace_id="large"))], 1)
    dealt = iter(portions)
    assert len(next(dealt).cells) == 1
    portions.learn(small.trace, 4, 4 * 0.1)
    assert len(next(dealt).cells) == 40
    sizes = [len(own.cells) for own in dealt if own.trace.trace_id == "large"]
    assert set(sizes[:-1]) == {4}  # ten times the bytes


def test_as_many_traces_are_under_way_as_there_are_workers(monkeypatch):
    monkeypatch.setattr(tasks, "_FIRST_CELLS", 4)
    names = [own.trace.name for own in Portions(work_of(*[8] * 6), 2)]
    assert names[:8] == ["0", "1", "0", "1", "2", "3", "2", "3"]


def test_a_single_trace_is_shared_by_all_workers():
    work = work_of(40)
    portions = Portions(work, 4)
    portions.learn(work[0].trace, 1, 0.001)
    sizes = [len(own.cells) for own in portions]
    assert sizes[:2] == [10, 8]
    assert Counter(sizes)[1] < 5
