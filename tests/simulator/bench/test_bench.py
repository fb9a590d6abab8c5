"""``sim bench``: its keys and counts, the warnings about BLAS, and the dense replay it is compared with."""

import json
import os
import sys
from functools import partial

import naive_torch
import numpy as np
import pytest

from simulator.bench import cases as bench
from simulator.bench import machine
from simulator.bench.trace import PROMPT_TOKENS, write_bench_trace
from simulator.cli.bench import print_bench
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.kernels import tiles
from simulator.policies.language import parse_policy
from simulator.workers import blas
from traces.errors import UserError
from traces.shape import ModelShape
from validate.cli import main as cli

MACHINE_KEYS = {"sgemm_gflops", "exp_ns", "copy_gbs", "cores"}
CASE_KEYS = {"policy", "tokens", "budget", "useful_gflop", "seconds", "fraction_of_sgemm", "peak_rss_mb"}
# Pairs of bfloat16 numbers are multiplied at twice the rate.
PASSES = 2 if tiles.HAS_PAIRS else 1
TINY = ModelShape(n_layers=2, n_query_heads=4, n_kv_heads=2, head_dim=16, dtype="bfloat16")


def run_sim(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sim", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.slow
def test_quick_bench_gives_what_is_promised(monkeypatch, capsys):
    assert run_sim(monkeypatch, "bench", "--quick", "--json", "--repeat", "1", "--tokens", "512") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert result["machine"].keys() >= MACHINE_KEYS
    assert all(result["machine"][name] > 0 for name in MACHINE_KEYS)
    policies = [case["policy"] for case in result["cases"]]
    assert policies == ["full cache", "snapkv", "rkv", "rkv+utility"]
    for case in result["cases"]:
        assert case.keys() >= CASE_KEYS
        assert case["seconds"] > 0
        assert 0 < case["fraction_of_sgemm"] < 1.2 * PASSES
        assert 30 < case["peak_rss_mb"] < 4000
        assert case["tokens"] == 512
    assert [case["budget"] for case in result["cases"]] == [None, 128, 128, 128]


def test_the_table_holds_every_case_and_what_is_known_of_growth(capsys):
    def case(policy, tokens, budget, workers, seconds, queries="1"):
        return {
            **{"policy": policy, "tokens": tokens, "budget": budget, "workers": workers, "layers": 2},
            "queries": queries,
            **{"seconds": seconds, "useful_gflop": 2.0, "fraction_of_sgemm": 0.5, "sgemm_gflops": 40.0},
            "peak_rss_mb": 123.4,
        }

    cases = [
        case("full cache", 1000, None, 2, 9.0),
        case("snapkv", 1000, 1024, 2, 1.0),
        case("snapkv", 1000, 128, 2, 192 / 1088),
        case("snapkv", 250, 128, 2, 96 / 1088),
        case("snapkv", 1000, 1024, 1, 1.9),
        case("snapkv", 1000, 1024, 2, 0.25, "1/8"),
    ]
    growth = bench.growth(cases)
    expected = {"tokens_exponent": 0.5, "budget_exponent": 1.0, "worker_speedup": 1.9}
    assert growth == pytest.approx(expected | {"eighth_of_queries": 0.25})
    assert bench.growth(cases[:2]) == {}
    rates = {"sgemm_gflops": 40.0, "exp_ns": 0.1, "copy_gbs": 8.0, "cores": 2, "sgemm_gflops_one_core": 21.0}
    rates |= {"blas": "b", "openblas_coretype": None, "bfloat16_pairs": False}
    print_bench({"machine": rates | {"bfloat16_pairs": True}, "cases": cases[:1], "growth": {}})
    assert "multiplies bfloat16 numbers in pairs" in capsys.readouterr().out
    print_bench({"machine": rates, "cases": cases, "growth": growth})
    out = capsys.readouterr().out
    assert "pairs" not in out
    assert out.count("snapkv") == 5
    assert "snapkv, 1/8 of queries" in out
    for words in ("40 GFLOP/s", "0.10 ns an exp", "full cache", "50%", "power of 0.50", "1.90 times as fast"):
        assert words in out


def counted_by_hand(trace, outcome, policy):
    """Walk step by step over who was evicted when."""
    n_pairs = n_cosines = 0
    compressions = sorted({(own.layer, own.n_tokens) for own in outcome.divisions})
    for layer, head in np.ndindex(trace.shape.n_layers, trace.shape.n_kv_heads):
        evicted_at = outcome.evicted_at[layer, head]
        for position in range(trace.prompt_tokens, trace.total_tokens):
            held = [p for p in range(position + 1) if evicted_at[p] > position]
            if len(held) <= position:
                n_pairs += len(held) * trace.shape.group_size
        compared = set()
        for n_tokens in (n for own, n in compressions if own == layer):
            held = [p for p in range(n_tokens) if evicted_at[p] >= n_tokens]
            compared |= {(p, q) for q in held for p in held if p < q}
        n_cosines += len(compared)
    return 2 * trace.shape.head_dim * (n_pairs + (n_cosines if "rkv" in policy else 0))


@pytest.mark.parametrize("policy", bench.POLICIES)
@pytest.mark.parametrize("budget", [20, 150])
def test_useful_work_is_what_a_count_by_hand_gives(tmp_path, policy, budget):
    trace = write_bench_trace(tmp_path / "tiny.kvtrace", TINY, 300)
    outcome = Engine([Request(trace, parse_policy(policy, buffer=40), budget)]).run()[0]
    case = bench.Case(policy, 300, budget, 1)
    assert len(outcome.divisions) >= 4
    assert bench.useful_flop(case, TINY, outcome) == counted_by_hand(trace, outcome, policy)


def test_useful_work_of_the_full_cache_is_every_decode_query_on_its_past():
    n_pairs = sum(position + 1 for position in range(PROMPT_TOKENS, 200))
    case = bench.Case(bench.FULL_CACHE, 200, None, 1)
    assert bench.useful_flop(case, TINY, None) == 2 * 16 * 2 * 4 * n_pairs


@pytest.mark.slow
def test_a_case_is_measured_in_this_process_too(tmp_path):
    path = write_bench_trace(tmp_path / "tiny.kvtrace", TINY, 400).path
    found = bench.measure_case(bench.Case("rkv", 400, 64, 2), path, path, repeat=2, seconds=0.01)
    assert found.keys() >= CASE_KEYS
    assert found["useful_gflop"] > 0
    assert 0 < found["fraction_of_sgemm"] < PASSES


def test_the_bench_trace_repeats_and_its_estimated_lse_is_near(tmp_path):
    trace = write_bench_trace(tmp_path / "tiny.kvtrace", TINY, 300)
    again = write_bench_trace(tmp_path / "again.kvtrace", TINY, 300)
    assert again.trace_id == trace.trace_id
    weights = np.exp(trace.queries(0)[0, -1] @ trace.keys(0)[0].T * trace.scale - trace.lse(0)[0, -1])
    assert 0.8 < weights.sum() < 1.2


@pytest.mark.slow
def test_a_bench_process_that_dies_or_refuses_is_told():
    with pytest.raises(UserError, match="exit code 7"):
        bench._in_own_process(partial(os._exit, 7))
    refused = partial(bench.make_plan, 0, 1, repeat=1, quick=True, long=False)
    with pytest.raises(UserError, match="--tokens is 0"):
        bench._in_own_process(refused)


@pytest.mark.slow
def test_memory_counts_what_is_written_and_not_what_is_mapped(tmp_path):
    path = tmp_path / "mapped"
    np.ones(50_000_000, np.uint8).tofile(path)

    def peak(work):
        with machine.PeakMemory(0.001) as memory:
            work()
        return memory.megabytes()

    usual = peak(lambda: None)
    assert peak(lambda: int(np.memmap(path, np.uint8, "r").sum())) - usual < 25
    assert 50 < peak(lambda: np.ones(100_000_000, np.uint8).sum()) - usual < 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], ["--tokens is 0", "2304 or more"]),
        (["--tokens", "-5", "--quick"], ["--tokens is -5", "512 or more"]),
        (["--tokens", "many"], ["--tokens", "integer"]),
        (["--repeat", "0"], ["--repeat is 0", "1 or more"]),
        (["--jobs", "-2"], ["--jobs is -2"]),
        (["--quick", "--long"], ["--quick", "--long"]),
        (["--jobs", "3", "--layers", "2"], ["--layers is 2", "3 or more"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(monkeypatch, capsys, arguments, words):
    assert run_sim(monkeypatch, "bench", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("sim: ")
    assert all(word in printed.err for word in words)


def test_no_room_for_the_traces_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    plan = bench.make_plan(4096, 1, repeat=1, quick=True, long=False)
    with pytest.raises(UserError, match="TMPDIR"):
        bench.run_bench(plan)


@pytest.fixture
def wide_processor(monkeypatch, tmp_path):
    """Pretend a processor with AVX-512 and an OpenBLAS nobody can ask, on 8 cores."""
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f avx512vl\n")
    monkeypatch.undo()
    monkeypatch.setattr(blas, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(blas, "blas_name", lambda: "scipy-openblas")
    monkeypatch.setattr(blas, "_loaded_threads", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.usefixtures("wide_processor")
class TestSlowBlas:
    @pytest.mark.parametrize("core", ["Haswell", "ZEN", "Nehalem"])
    def test_a_core_type_without_avx512_is_told(self, core):
        told = blas.narrow_kernels({"OPENBLAS_CORETYPE": core})
        assert f"OPENBLAS_CORETYPE={core}" in told
        assert "unset OPENBLAS_CORETYPE" in told

    @pytest.mark.parametrize("core", ["SkylakeX", "Cooperlake", "", "nonsense"])
    def test_other_core_types_are_not(self, core):
        assert blas.narrow_kernels({"OPENBLAS_CORETYPE": core}) is None
        assert blas.narrow_kernels({}) is None

    def test_a_narrow_processor_or_another_library_is_fine(self, monkeypatch, tmp_path):
        environ = {"OPENBLAS_CORETYPE": "Haswell"}
        monkeypatch.setattr(blas, "blas_name", lambda: "mkl-sdl")
        assert blas.narrow_kernels(environ) is None
        monkeypatch.setattr(blas, "blas_name", lambda: "openblas")
        monkeypatch.setattr(blas, "_CPUINFO", tmp_path / "none")
        assert blas.narrow_kernels(environ) is None

    @pytest.mark.parametrize(
        ("library", "environ", "n_threads"),
        [
            ("scipy-openblas", {}, 8),
            ("scipy-openblas", {"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "1"}, 4),
            ("openblas", {"OMP_NUM_THREADS": "3"}, 3),
            ("mkl-sdl", {"OPENBLAS_NUM_THREADS": "1"}, 8),
        ],
    )
    def test_many_threads_under_many_workers_are_told(self, monkeypatch, library, environ, n_threads):
        monkeypatch.setattr(blas, "blas_name", lambda: library)
        told = blas.crowded_threads(2, environ)
        assert f"{n_threads} threads in each of 2 workers" in told
        assert "_NUM_THREADS=1" in told
        assert blas.crowded_threads(1, environ) is None

    def test_one_thread_each_is_fine(self, monkeypatch):
        assert blas.crowded_threads(2, {"OPENBLAS_NUM_THREADS": "1"}) is None
        monkeypatch.setattr(blas, "_loaded_threads", lambda: 1)
        assert blas.crowded_threads(2, {}) is None

    def test_the_command_says_it_once_in_one_line(self, monkeypatch, capsys, make_trace):
        monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
        arguments = ["replay", "-t", make_trace().path, "-p", "rkv,snapkv", "-b", "20", "--jobs", "2"]
        assert run_sim(monkeypatch, *arguments) == 0
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert err.startswith("sim: OPENBLAS_CORETYPE=Haswell")
        assert "set OPENBLAS_NUM_THREADS=1" in err


def test_threads_are_set_unless_the_user_did():
    environ = {"OMP_NUM_THREADS": "6"}
    blas.use_one_thread(environ=environ)
    assert environ == {"OMP_NUM_THREADS": "6", "VECLIB_MAXIMUM_THREADS": "1"}
    environ = {"MKL_NUM_THREADS": "4"}
    blas.use_one_thread("openblas", environ=environ)
    assert environ == {"MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("policy", naive_torch.SCORES)
@pytest.mark.parametrize("prompt_tokens", [20, 50])
def test_the_dense_torch_replay_agrees(make_trace, policy, prompt_tokens):
    trace = make_trace(n_tokens=160, prompt_tokens=prompt_tokens, head_dim=16)
    request = Request(trace, parse_policy(policy, buffer=16), 32, keep_retained=True)
    outcome = Engine([request]).run()[0]
    ours = {(kept.layer, kept.n_tokens, kept.kv_head): kept.positions.tolist() for kept in outcome.retained}
    found = naive_torch.replay(trace, policy, 32, 16)
    theirs = {
        (layer, n_tokens, kv_head): own
        for layer, (_, compressions) in enumerate(found)
        for n_tokens, positions in compressions
        for kv_head, own in enumerate(positions.tolist())
    }
    assert len(theirs) > 20
    assert ours == theirs
    np.testing.assert_allclose(np.stack([mass.numpy() for mass, _ in found]), outcome.mass, atol=1e-4)
