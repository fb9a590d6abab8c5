"""Time the replay against the dense torch replay of `naive_torch`: ``python tests/tools/compare_speed.py``.

Both do the same work in one process: the mass of every decode step and who is retained, for a few layers of
an 8B model. The replay has its workers over layers, torch as many threads within an operation. Where others
keep the cores busy, compare CPU times with ``--workers 1``: threads that wait for each other wait long there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path

from simulator.workers.blas import use_one_thread

use_one_thread("openblas")

import naive_torch  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from simulator.bench.trace import eight_billion  # noqa: E402
from simulator.engine.loop import Engine  # noqa: E402
from simulator.engine.request import Request  # noqa: E402
from simulator.policies.language import parse_policy  # noqa: E402
from simulator.workers.cores import n_cores  # noqa: E402
from traces import make_synthetic  # noqa: E402


def timed(work):
    """Seconds, CPU seconds of all threads, and what ``work`` gives."""
    started, used = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - started, time.process_time() - used, found


def agreement(outcome, found):
    """Mean difference of mass, and share of retained positions that both kept."""
    naive_mass = np.stack([mass.numpy() for mass, _ in found])
    ours = {}
    for kept in outcome.retained:
        ours.setdefault((kept.layer, kept.n_tokens), {})[kept.kv_head] = set(kept.positions.tolist())
    shared = total = 0
    for layer, (_, compressions) in enumerate(found):
        for n_tokens, positions in compressions:
            for kv_head, own in enumerate(positions.tolist()):
                shared += len(ours[layer, n_tokens][kv_head] & set(own))
                total += len(own)
    return float(np.abs(naive_mass - outcome.mass).mean()), shared / total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--workers", type=int, default=n_cores(), help="and layers, so that each has one")
    parser.add_argument("--policy", choices=naive_torch.SCORES, nargs="+", default=list(naive_torch.SCORES))
    parser.add_argument("--repeat", type=int, default=3, help="rounds of one torch replay and three of ours")
    asked = parser.parse_args()
    torch.set_num_threads(asked.workers)
    with tempfile.TemporaryDirectory() as folder:
        # Exact log-sum-exps, unlike the bench's: the masses are compared.
        path, shape = Path(folder) / "compare.kvtrace", eight_billion(asked.workers)
        trace = make_synthetic(path, shape=shape, prompt_tokens=128, total_tokens=asked.tokens, seed=0)
        workers = f"{asked.workers} worker{'s' if asked.workers > 1 else ''}"
        print(f"{workers}, a layer of {asked.tokens:,} tokens each, buffer 128")
        # As `sim replay` does for the cells of a trace.
        with trace.mapped():
            for budget, name in product(asked.budget, asked.policy):
                compare(trace, name, budget, asked)


def compare(trace, name, budget, asked):
    """Time both under one policy and budget, and print what was seen."""
    policy = parse_policy(name, buffer=128)

    def replay():
        request = Request(trace, policy, budget, keep_retained=True)
        return Engine([request], asked.workers).run()[0]

    replay()  # compiles
    runs, dense_runs = [], []
    for _ in range(asked.repeat):
        dense_runs.append(timed(lambda: naive_torch.replay(trace, name, budget, 128)))
        runs += [timed(replay) for _ in range(3)]
    (dense, dense_used), (seconds, used) = (
        (min(run[0] for run in timings), min(run[1] for run in timings)) for timings in (dense_runs, runs)
    )
    difference, overlap = agreement(runs[0][2], dense_runs[0][2])
    print(
        f"{name:7s} {budget:5,} torch {dense:.2f} s, replay {seconds:.3f} s: {dense / seconds:.1f} times "
        f"(CPU {dense_used:.2f} s, {used:.3f} s: {dense_used / used:.1f} times); "
        f"mean mass differs by {difference:.1e}, {overlap:.3%} retained by both"
    )


if __name__ == "__main__":
    main()
