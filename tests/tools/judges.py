"""A judge of a few small traces."""

from __future__ import annotations

from simulator.policies.language import parse_policy
from simulator.search.judge import Judge


def made_judge(make_trace, metric="mass_mean", n=4):
    traces = [make_trace(n_tokens=90 + i, task={"family": "ab"[i % 2]}) for i in range(n)]
    base = parse_policy("streamingllm:buffer=5")
    return Judge(traces, metric, base, waves={}, seed=0)
