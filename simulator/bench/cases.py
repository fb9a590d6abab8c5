"""How close replays come to the speed of the machine: standard cases, each timed in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from simulator.bench.machine import PeakMemory, copy_rate, exp_time, sgemm_rate
from simulator.bench.trace import PROMPT_TOKENS, eight_billion, write_bench_trace
from simulator.engine.full_cache import FullCache
from simulator.engine.loop import Engine
from simulator.engine.request import Outcome, Request
from simulator.engine.sampling import Sampling
from simulator.kernels.tiles import HAS_PAIRS
from simulator.policies.language import parse_policy
from simulator.workers.blas import blas_name, use_one_thread
from simulator.workers.cores import n_cores
from simulator.workers.interrupts import held_back
from traces.errors import UserError
from traces.shape import ModelShape
from traces.store import open_trace
from traces.trace import Trace

BUFFER = 128
FULL_CACHE = "full cache"
# One layer a core makes no model for a wave to divide a budget over: ReasonAlloc stands here without its
# first level, which costs nothing at replay time.
POLICIES = ("snapkv", "rkv", "rkv+utility")
_SCALED = "snapkv"
_EIGHTH = Fraction(1, 8)


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes
    ----------
    policy : str
        ``full cache`` for the part that all policies of a comparison share.
    tokens : int
        Of prompt and completion.
    budget : int or None
        Entries per KV head; None for the full cache.
    workers : int
        Threads over layers.
    queries : Fraction
        Share of the decode steps that is measured.
    """

    policy: str
    tokens: int
    budget: int | None
    workers: int
    queries: Fraction = Fraction(1)


@dataclass(frozen=True)
class Plan:
    """All that one bench times: ``layers`` of the 8B shape, ``cases`` of it, ``repeat`` times each."""

    layers: int
    cases: tuple[Case, ...]
    repeat: int
    seconds: float

    @property
    def lengths(self) -> list[int]:
        """Tokens of the traces that are needed, the shortest first."""
        return sorted({case.tokens for case in self.cases})


def make_plan(
    tokens: int, workers: int, *, repeat: int, quick: bool, long: bool, layers: int | None = None
) -> Plan:
    """Choose the cases: policies by budgets, then what tells how time grows.

    Parameters
    ----------
    tokens : int
        Length of the standard trace.
    workers : int
        Threads.
    repeat : int
        Replays of each case, of which the fastest counts.
    quick : bool
        One budget, and nothing about growth.
    long : bool
        Time a trace four times as long as well.
    layers : int, optional
        Layers of the traces; one per thread by default.

    Raises
    ------
    UserError
        If the trace is too short for its budgets, or there are fewer layers than threads.
    """
    layers = workers if layers is None else layers
    if layers < workers:
        raise UserError(f"--layers is {layers}; allowed: {workers} or more, one for every thread")
    budgets = (128,) if quick else (1024, 128)
    least = 2 * (max(budgets) + BUFFER)
    if tokens < least:
        raise UserError(f"--tokens is {tokens}; allowed: {least} or more, to replay budget {max(budgets)}")
    cases = [Case(FULL_CACHE, tokens, None, workers)]
    cases += [Case(policy, tokens, budget, workers) for policy in POLICIES for budget in budgets]
    if not quick:
        cases += [Case(_SCALED, tokens, budget, workers) for budget in (256, 512)]
        # The small budget evicts soon: a trace's first tokens, which cost nothing, hardly bend the line.
        cases += [Case(_SCALED, n, 128, workers) for n in (tokens // 4, 4 * tokens)[: 1 + long]]
        cases += [Case(_SCALED, tokens, 1024, 1)] if workers > 1 else []
        cases += [Case(_SCALED, tokens, 1024, workers, _EIGHTH)]
    return Plan(layers, tuple(cases), repeat, 0.05 if quick else 0.2)


def run_bench(plan: Plan, on_case: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure the machine and every case.

    Returns
    -------
    dict
        ``machine``: ``sgemm_gflops`` (all cores, GFLOP/s), ``sgemm_gflops_one_core``, ``exp_ns`` (per logit),
        ``copy_gbs`` (GB/s read and written), ``cores``, ``blas``, ``openblas_coretype``, ``bfloat16_pairs``
        (whether bfloat16 numbers are multiplied in pairs, which can pass the rate of sgemm).
        ``cases``: ``policy``, ``tokens``, ``budget`` (entries per KV head), ``workers``, ``layers``,
        ``useful_gflop``, ``seconds`` (the fastest), ``sgemm_gflops`` (of as many threads, in the same
        process), ``fraction_of_sgemm``, ``peak_rss_mb`` (10^6 bytes, without mapped trace pages).
        ``growth``: exponents of time and what a second worker gains, as far as the cases tell.

    Raises
    ------
    UserError
        If there is no room for the traces, or a case dies.
    """
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="sim-bench-", ignore_cleanup_errors=True) as folder:
        shape = eight_billion(plan.layers)
        _require_room(Path(folder), shape, plan.lengths)
        machine = _in_own_process(partial(measure_machine, plan.seconds))
        on_case()
        paths = {n: write_bench_trace(Path(folder) / f"{n}.kvtrace", shape, n).path for n in plan.lengths}
        # Long enough for two compressions at any budget: compiles and touches all there is.
        n_warm = 2 * (max(case.budget or 0 for case in plan.cases) + BUFFER)
        warm = write_bench_trace(Path(folder) / "warm.kvtrace", shape, n_warm).path
        cases = []
        for case in plan.cases:
            measure = partial(measure_case, case, paths[case.tokens], warm, plan.repeat, plan.seconds)
            cases.append(_in_own_process(measure))
            on_case()
    return {"machine": machine, "cases": cases, "growth": growth(cases)}


def measure_machine(seconds: float) -> dict[str, Any]:
    """Measure the machine's rates, each for about ``seconds``."""
    return {
        "sgemm_gflops": sgemm_rate(n_cores(), seconds),
        "exp_ns": exp_time(seconds),
        "copy_gbs": copy_rate(seconds=seconds),
        "cores": n_cores(),
        "sgemm_gflops_one_core": sgemm_rate(1, seconds),
        "blas": blas_name(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "bfloat16_pairs": HAS_PAIRS,
    }


def measure_case(case: Case, path: Path, warm: Path, repeat: int, seconds: float) -> dict[str, Any]:
    """Time one case in this process, and its products alone before every replay; the best of each counts."""
    _replay(case, open_trace(warm))
    trace, times, rates = open_trace(path), [], []
    # As cells of one trace find it.
    with trace.mapped():
        for _ in range(repeat):
            rates.append(sgemm_rate(case.workers, seconds))
            started = time.perf_counter()
            _replay(case, trace)
            times.append(time.perf_counter() - started)
        # Who watches takes time of a worker's core.
        with PeakMemory() as memory:
            outcome = _replay(case, trace)
    useful = useful_flop(case, trace.shape, outcome) / 1e9
    # The trace's pages go with what holds them.
    del outcome
    return {
        "policy": case.policy,
        "tokens": case.tokens,
        "budget": case.budget,
        "useful_gflop": useful,
        "seconds": min(times),
        "fraction_of_sgemm": useful / min(times) / max(rates),
        "peak_rss_mb": memory.megabytes(),
        "workers": case.workers,
        "queries": str(case.queries),
        "layers": trace.shape.n_layers,
        "sgemm_gflops": max(rates),
    }


def _replay(case: Case, trace: Trace) -> Outcome | None:
    if case.budget is None:
        FullCache(trace, case.workers)
        return None
    sample = Sampling(case.queries).draw(trace, seed=0)
    request = Request(trace, parse_policy(case.policy, buffer=BUFFER), case.budget, sample=sample)
    return Engine([request], case.workers).run()[0]


def useful_flop(case: Case, shape: ModelShape, outcome: Outcome | None) -> float:
    """Count the work that no replay can avoid, in FLOP; a product of two vectors is 2 * head_dim.

    The full cache needs the logits of every decode query on all keys before it. A policy needs those on what
    its KV head retains, once that has evicted (before, the mass is 1); R-KV needs the cosine of every pair of
    keys that a compression meets for the first time.
    """
    if outcome is None:
        n_pairs = sum(range(PROMPT_TOKENS + 1, case.tokens + 1)) * shape.n_layers * shape.n_query_heads
        return 2.0 * shape.head_dim * n_pairs
    n_pairs = 0
    for layer in range(shape.n_layers):
        # Per KV head: entries held, and how many of them an earlier compression has met.
        start, lengths, met = PROMPT_TOKENS, [PROMPT_TOKENS] * shape.n_kv_heads, [0] * shape.n_kv_heads
        compressions = [
            (division.n_tokens, division.lengths.tolist())
            for division in outcome.divisions
            if division.layer == layer
        ]
        for stop, after in [*compressions, (case.tokens, None)]:
            n_steps = stop - start
            for length, n_old in zip(lengths, met, strict=True):
                if length < start:
                    n_pairs += shape.group_size * (n_steps * length + n_steps * (n_steps + 1) // 2)
                if after is not None and case.policy.startswith("rkv"):
                    n_new = length + n_steps - n_old
                    n_pairs += n_new * n_old + n_new * (n_new - 1) // 2
            if after is not None:
                start, lengths, met = stop, after, after
    # Of a sample, so much less has to be measured; nothing else of a sampled case counts.
    return 2.0 * shape.head_dim * n_pairs * float(case.queries)


def growth(cases: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Tell how time grows, from the cases that differ in one thing only.

    Returns
    -------
    dict
        ``tokens_exponent``: of time in tokens, the steepest between neighbours. ``budget_exponent``: of time
        in the mean entries held, budget + buffer / 2. ``worker_speedup``: time of one worker over that of
        all. ``eighth_of_queries``: time with an eighth of the queries measured over that with all. Each only
        where there are cases for it.
    """
    every = [case for case in cases if case["policy"] == _SCALED]
    scaled = [case for case in every if case["queries"] == "1"]
    if not scaled:
        return {}
    workers = max(case["workers"] for case in scaled)
    found = {}
    by_tokens = {c["tokens"]: c["seconds"] for c in scaled if (c["budget"], c["workers"]) == (128, workers)}
    lengths = sorted(by_tokens)
    exponents = [
        math.log(by_tokens[longer] / by_tokens[shorter]) / math.log(longer / shorter)
        for shorter, longer in pairwise(lengths)
    ]
    if exponents:
        found["tokens_exponent"] = max(exponents)
    most = max(scaled, key=lambda c: (c["budget"], c["workers"]))
    least = min((c for c in scaled if c["tokens"] == most["tokens"]), key=lambda c: c["budget"])
    if most["budget"] > least["budget"]:
        held = [case["budget"] + BUFFER / 2 for case in (most, least)]
        found["budget_exponent"] = math.log(most["seconds"] / least["seconds"]) / math.log(held[0] / held[1])
    alone = [c for c in scaled if c["workers"] == 1 and c["budget"] == most["budget"]]
    if alone and workers > 1:
        found["worker_speedup"] = alone[0]["seconds"] / most["seconds"]
    sampled = [case for case in every if case["queries"] == str(_EIGHTH)]
    if sampled:
        found["eighth_of_queries"] = sampled[0]["seconds"] / most["seconds"]
    return found


def _require_room(folder: Path, shape: ModelShape, lengths: list[int]) -> None:
    per_token = (shape.n_query_heads + shape.n_kv_heads) * shape.head_dim * shape.itemsize
    # Twice the largest: a trace is staged before it is written.
    needed = (sum(lengths) + max(lengths)) * per_token * shape.n_layers
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the bench's traces take {needed / 1e9:.1f} GB"
            "; allowed: fewer --tokens or --jobs, or another folder in TMPDIR"
        )


def _in_own_process(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``measure`` in a fresh interpreter, so that no memory is left from others."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(measure, theirs), daemon=True)
    with held_back():
        process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"a bench process died with exit code {process.exitcode}; allowed: fewer --tokens or --jobs, if "
            "memory ran out"
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return dict(answer)


def _answer(measure: Callable[[], dict[str, Any]], connection: Connection) -> None:
    # An interrupt is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection.send(measure())
    except Exception as error:
        # A traceback does not travel.
        error.add_note(traceback.format_exc())
        connection.send(error)
