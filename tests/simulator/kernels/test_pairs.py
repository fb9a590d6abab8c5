"""A processor that multiplies pairs of bfloat16 numbers gives the very results of one that does not."""

from __future__ import annotations

import os
import subprocess
import sys

import llvmlite.binding
import naive_rules
import numpy as np
import pytest
from numba.core.codegen import get_host_cpu_features
from places import ROOT

from simulator.engine.full_cache import FullCache
from simulator.kernels import tiles
from simulator.kernels.duplicates import Redundancy
from simulator.kernels.windows import window_attention, window_importance
from traces.numbers import round_to_storage, to_float32

has_pairs = pytest.mark.skipif(not tiles.HAS_PAIRS, reason="this processor multiplies no pairs")
POLICIES = ["snapkv:buffer=8", "rkv+utility:buffer=11,delta=11", "vatp:buffer=9,sinks=2", "rkv-code:buffer=8"]
REPLAY = """
import sys
import numpy as np
from simulator.engine.loop import Engine
from simulator.engine.full_cache import FullCache
from simulator.policies.language import parse_policy
from simulator.engine.request import Request
from simulator.kernels.tiles import HAS_PAIRS
from traces import open_trace

found, (path, *traces), policies = {"has_pairs": HAS_PAIRS}, sys.argv[1].split(), sys.argv[2].split()
for name in traces:
    trace = open_trace(name)
    full = FullCache(trace)
    found[f"{name} strongest"], found[f"{name} largest"] = full.strongest, full.largest
    for policy in policies:
        (outcome,) = Engine([Request(trace, parse_policy(policy), 20)]).run()
        found[f"{name} {policy} evicted"], found[f"{name} {policy} mass"] = outcome.evicted_at, outcome.mass
np.savez(path, **found)
"""


@pytest.mark.slow
@has_pairs
def test_whole_replays_are_equal(make_trace, rng, tmp_path, machine_code):
    traces = []
    for head_dim in (34, 64):
        values = rng.normal(size=(2, 2, 150, head_dim))
        traces.append(make_trace(n_tokens=150, dtype="bfloat16", head_dim=head_dim, values=values).path)
    features = [name for name in get_host_cpu_features().split(",") if name != "+avx512bf16"]
    without = {
        "NUMBA_CPU_NAME": llvmlite.binding.get_host_cpu_name(),
        "NUMBA_CPU_FEATURES": ",".join(features),
        "NUMBA_CACHE_DIR": str(machine_code("no-pairs")),
    }
    results = []
    for serial, told in enumerate(({}, without)):
        path = tmp_path / f"{serial}.npz"
        asked = " ".join(map(str, (path, *traces))), " ".join(POLICIES)
        environment = os.environ | told | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", REPLAY, *asked], env=environment, check=True, cwd=ROOT)
        results.append(dict(np.load(path)))
    first, second = results
    assert [first.pop("has_pairs"), second.pop("has_pairs")] == [True, False]
    assert first.keys() == second.keys()
    assert len(first) == len(traces) * 2 * (1 + len(POLICIES))
    for name, found in first.items():
        np.testing.assert_array_equal(found, second[name], err_msg=name)


def _stored_exactly(rng, shape):
    return to_float32(round_to_storage(rng.normal(size=shape).astype(np.float32), "bfloat16"), "bfloat16")


@pytest.mark.parametrize("head_dim", [6, 33, 64])
def test_windows_score_bfloat16_numbers_as_any(rng, head_dim):
    keys = [_stored_exactly(rng, (n, head_dim)) for n in (100, 9, 61)]
    queries = _stored_exactly(rng, (3, 3, 8, head_dim))
    found = window_importance(keys, queries, scale=0.2, n_left_out=8, kernel_size=1)
    for held, asked, own in zip(keys, queries, found, strict=True):
        expected = window_attention(held[:-8], asked, 0.2, "max_logits")
        np.testing.assert_allclose(own[:-8], expected, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [6, 33, 64])
def test_redundancy_of_bfloat16_numbers_is_that_of_any(rng, head_dim):
    keys = [
        _stored_exactly(rng, (n, head_dim)) + _stored_exactly(rng, (1, head_dim)).round()
        for n in (100, 9, 61)
    ]
    keys = [to_float32(round_to_storage(own, "bfloat16"), "bfloat16") for own in keys]
    redundancy = Redundancy(0.5, spare_column0=False)
    for share in (0.4, 1):
        some = [own[: int(len(own) * share)] for own in keys]
        positions = [np.arange(len(own), dtype=np.int32) for own in some]
        found = redundancy.shares(some, positions)
        for own, shares in zip(some, found, strict=True):
            expected = _shares(own)
            np.testing.assert_allclose(shares, expected, rtol=2e-5)
            assert not np.allclose(shares, expected.mean(), rtol=1e-3)


def _shares(keys):
    similar = naive_rules.cosines(keys.astype(np.float64))
    for i, row in enumerate(similar):
        row[i] = 0
        duplicates = np.flatnonzero(row > 0.5)
        row[duplicates[-1:]] = 0
    means = similar.mean(axis=0)
    weights = np.exp(means - means.max())
    return weights / weights.sum()


def test_full_cache_of_bfloat16_numbers_is_that_of_any(make_trace):
    trace = make_trace(n_tokens=150, dtype="bfloat16", head_dim=34)
    full = FullCache(trace)
    queries, keys = (to_float32(trace.stored(0, name), "bfloat16") for name in ("queries", "keys"))
    for head, own in enumerate(queries[:, trace.prompt_tokens :]):
        products = own.astype(np.float64) @ keys[head // 2].T.astype(np.float64)
        future = np.arange(150) > np.arange(trace.prompt_tokens, 150)[:, None]
        np.testing.assert_array_equal(
            np.where(future, -np.inf, products).argmax(axis=1), full.strongest[0, head]
        )
