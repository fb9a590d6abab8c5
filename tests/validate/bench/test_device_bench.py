"""The measurement of a device, here of a CPU with its twins: what it computes, tells and keeps."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from places import ROOT
from tiny_models import tiny_model

from simulator.policies.language import parse_policy
from traces.errors import NoDeviceError, UserError
from validate.bench import decode, run
from validate.bench.check import check_kernels
from validate.bench.decode import mean_over_text
from validate.bench.kernels import Setting, kernel_cases
from validate.bench.run import BenchPlan, aims, round_down, run_bench
from validate.eviction.device.back_end import DeviceBackEnd
from validate.eviction.kernels.ops import torch_ops

PLAN = BenchPlan(
    entries=24, buffer=8, lengths=(64, 128), kernel_batches=(1, 3), most_batch=3, repeat=2, minutes=5
)
SETTING = Setting(2, 2, 2, 16, 24, 8, torch.float32, torch.device("cpu"), True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", n_kv_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def result(model):
    kept = []
    found = run_bench(model, "tiny", PLAN, keep=lambda so_far: kept.append(json.dumps(so_far)))
    assert json.loads(kept[-1]) == json.loads(json.dumps(found))
    return found


@pytest.mark.slow
def test_tables_and_statistics_need_not_be_installed():
    absent = ("polars", "altair", "scipy", "math_verify")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import validate.cli.main, validate.eviction.decode\n"
        "import validate.bench.run, validate.models.random_weights"
    )
    root = ROOT
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


@pytest.mark.slow
def test_everything_is_measured_once(result):
    assert not result["skipped"]
    kernels = {(case["kernel"], case["batch"], case["ragged"]) for case in result["kernels"]}
    assert len(kernels) == len(result["kernels"]) == 7 * 2 * 2
    decoded = [(case["policy"], case["batch"], case["new_tokens"]) for case in result["decode"]]
    assert sorted(set(decoded)) == sorted(
        (policy, batch, length)
        for policy in ("full cache", "full cache, transformers", "snapkv", "rkv", "reasonalloc")
        for batch, length in ((1, 128), (3, 64), (3, 128))
        if batch == 1 or policy != "full cache, transformers"
    )
    assert all(check["error"] <= check["allowed"] for check in result["checks"])


@pytest.mark.slow
def test_memory_and_entries_are_those_of_the_plan(result):
    for case in result["decode"]:
        if case["policy"] == "full cache, transformers":
            # Two layers, keys and values of two KV heads; the last step has added its own.
            assert case["bytes_measured"] == 2 * 2 * 2 * (16 + 128 - 3 + 24) * 16 * 4
            continue
        assert case["bytes_measured"] == case["bytes_planned"]
        if case["policy"] in ("snapkv", "rkv"):
            # Two layers of two KV heads, each with its budget and a full buffer.
            assert case["entries_measured"] == case["entries_planned"] == 2 * 2 * (24 + 8)
        if case["policy"] != "full cache":
            assert 0 < case["entries_measured"] <= case["entries_planned"]
            assert case["tokens_per_second"] == pytest.approx(case["batch"] / case["step_seconds"])


def test_aims_are_set_against_what_was_measured(result):
    assert [aim["aim"].split()[0] for aim in result["aims"]] == ["bytes", "entries"]
    assert all(aim["holds"] for aim in result["aims"])
    slow = json.loads(json.dumps(result))
    slow["machine"]["device"] = "a GPU"
    for case in slow["decode"]:
        case["tokens_per_second"] = {"full cache": 100.0, "rkv": 300.0}.get(case["policy"], 200.0)
    slow["decode"][1]["entries_measured"] *= 2
    found = {aim["aim"]: aim for aim in aims(slow, PLAN)}
    assert not found["entries held over those planned, at most"]["holds"]
    at_most = found["time of reasonalloc over rkv, batch 1"]
    assert (at_most["seen"], at_most["asked"], at_most["holds"]) == (1.5, 1.02, False)
    gain = "tokens/s of reasonalloc over the full cache, 128 tokens, "
    assert found[gain + "batch 1"]["holds"]
    assert (
        found["tokens/s of reasonalloc over the full cache of transformers, 128 tokens, batch 1"]["seen"] == 1
    )
    assert (found[gain + "the largest batches"]["asked"], found[gain + "the largest batches"]["holds"]) == (
        5.0,
        False,
    )
    assert len([name for name in found if name.startswith("attention's share")]) == 2


def test_nothing_begins_after_the_time(model):
    found = run_bench(model, "tiny", replace(PLAN, minutes=1e-9))
    assert not found["decode"]
    assert {skipped["why"] for skipped in found["skipped"]} == {"1e-09 minutes were over"}
    assert any("reasonalloc at batch 1" in skipped["what"] for skipped in found["skipped"])


def test_a_cycle_is_over_when_every_layer_and_sequence_has_compressed(model, monkeypatch):
    caches = []

    class Kept(decode.DeviceCache):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            caches.append(self)

    monkeypatch.setattr(decode, "DeviceCache", Kept)
    # Heads whose budgets are larger than what they hold put off the next compression of their layer.
    policy = parse_policy("rkv+utility:window=2,delta=1,beta=4,mu=0,head_cap=3", buffer=12)
    torch.manual_seed(0)
    decode.measure(model, decode.Case("unequal", policy, 3, 128, 24))
    assert caches[0].n_compressions > 3
    assert (caches[0].schedule.n_compressions >= 3).all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_a_batch_that_does_not_fit_is_told_and_let_go_of(model, monkeypatch, error):
    caches, alive = [], []

    class Full(decode.DeviceCache):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            caches.append(weakref.ref(self))

    def fail(self, due):
        raise type(error)(*error.args)

    monkeypatch.setattr(decode, "DeviceCache", Full)
    monkeypatch.setattr(DeviceBackEnd, "compress", fail)
    bench = run._Bench(model, "tiny", PLAN, lambda line: None, lambda result: None)
    monkeypatch.setattr(bench, "_free", lambda: alive.append(caches[-1]() is not None))
    assert not bench._decode("rkv", 2, 128)
    assert alive == [False]
    assert "does not fit into the memory" in bench.result["skipped"][0]["why"]


def test_what_not_even_one_sequence_fits_in_is_told(model, monkeypatch):
    bench = run._Bench(model, "tiny", PLAN, lambda line: None, lambda result: None)
    monkeypatch.setattr(bench, "_fitting", lambda policy, new_tokens: 0)
    bench._decode_largest("full cache", 128)
    assert bench.result["skipped"][0]["why"] == "not even one sequence fits"


def test_a_model_that_the_kernels_are_not_made_for_is_refused_at_once():
    kept = []
    with pytest.raises(UserError, match="head_dim is 24"):
        run_bench(tiny_model("llama", n_kv_heads=2, head_dim=24), "tiny", PLAN, keep=kept.append)
    assert not kept


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (("--budget", 31), 2, "--budget is 31; allowed: 32 or more"),
        (("--buffer", 3), 2, "--buffer is 3; allowed: 4 or more"),
        (("--lengths", "200"), 2, "--lengths holds 200"),
        (("--gpu", "--device", "cpu"), 6, "--gpu is given with --device cpu"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run_sim, given, code, told):
    found, _, error = run_sim("validate", "bench", *given)
    assert found == code
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_least_that_can_be_measured(run_sim, tmp_path):
    small = ("--budget", 32, "--buffer", 4, "--lengths", 72, "--batches", 1, "--most-batch", 2)
    code, printed, _ = run_sim("validate", "bench", "--device", "cpu", "-q", "--out", tmp_path, *small)
    assert code == 0
    assert "reasonalloc" in printed
    assert len(json.loads((tmp_path / "cpu-random-tiny.json").read_text())["decode"]) == 9


def test_a_text_takes_the_mean_of_its_steps():
    # A step of 1 + 2 s, s the share written, lasts 2 on average.
    assert mean_over_text([(1 / 8, 1.25), (1 / 2, 2.0), (1.0, 3.0)]) == pytest.approx(2.0)
    # Where early steps are no shorter than later ones nothing negative is extrapolated.
    assert mean_over_text([(1 / 2, 1.0), (1.0, 3.0)]) == pytest.approx(0.25 * 1 + 0.5 * 2)


def test_batches_are_round_where_they_are_large():
    assert [round_down(batch) for batch in (3, 8, 15, 401)] == [3, 8, 8, 400]


@pytest.mark.parametrize(
    ("broken", "written"),
    [
        ("attend", 5),
        ("window_importance", 4),
        ("redundancy", 3),
        ("combine_scores", 4),
        ("demand", 4),
        ("select", 4),
        ("compact", 1),
    ],
)
def test_a_wrong_kernel_is_noticed_before_it_is_timed(broken, written):
    right = torch_ops()

    def wrong(*arrays, **settings):
        getattr(right, broken)(*arrays, **settings)
        arrays[written].view(-1)[3] += 1

    with pytest.raises(NoDeviceError, match="is wrong on this device"):
        list(check_kernels(right._replace(**{broken: wrong}), right, SETTING))
    assert len(list(check_kernels(right, right, SETTING))) == 10


def test_bytes_are_what_has_to_move_at_least():
    cases = {case["kernel"]: case for case in kernel_cases(torch_ops(), SETTING, 1)}
    held = 2 * ((6 + 8) + (42 + 8))
    assert cases["attention"]["bytes"] == held * 2 * 16 * 4
    assert cases["compaction"]["bytes"] == 2 * (6 + 42) * (4 * 16 * 4 + 8)
    assert cases["redundancy"]["gflop"] == pytest.approx(2 * 2 * (14**2 + 50**2) * 16e-9)


class _NotCompiled(Exception):
    """An error such as Triton raises, of a type of its own."""


_NotCompiled.__module__ = "triton.compiler.errors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            _NotCompiled("at 12:3:\n  out of shared memory"),
            "cannot be compiled for this device: at 12:3: out of",
        ),
        (torch.OutOfMemoryError("no room"), "does not fit into the memory of device 'cpu'"),
    ],
)
def test_what_a_device_cannot_do_is_one_line_and_what_was_measured_is_kept(model, monkeypatch, error, words):
    def fail(*_):
        raise error
        yield

    monkeypatch.setattr(run, "kernel_cases" if "compiled" in words else "check_kernels", fail)
    kept = []
    with pytest.raises(NoDeviceError, match=words):
        run_bench(model, "tiny", PLAN, keep=lambda so_far: kept.append(len(so_far["checks"])))
    assert (max(kept, default=0) > 0) == ("compiled" in words)
