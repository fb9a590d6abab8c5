"""The published eviction code of G-KV and VaSE retains what the replay retains."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import replayed
from places import GOLDEN

from simulator.policies.attention import leading_attention
from simulator.policies.language import parse_policy
from simulator.policies.view import CacheView
from traces import write_trace

FIRST, STEP, BUDGET = 90, 24, 60
CASES = {
    ("gkv", "max"): "gkv:window=12,no_match=column0",
    ("gkv", "mean"): "gkv:window=12,no_match=column0,update=mean,decay=0.6",
    ("gkv", "sum"): "gkv:window=12,no_match=column0,update=sum,alpha=0.9",
    ("vase", "plain"): "vase:window=12,sinks=0,sampled=false,kernel_size=1",
    ("vase", "smooth"): "vase:window=12,sinks=0,sampled=false",
}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_replay_retains_the_published_entries(method, name, tmp_path):
    arrays = np.load(GOLDEN / f"decoding-{method}.npz")
    given = {
        key: arrays[key].astype(np.float32)[None] for key in ("queries", "keys", "values") if key in arrays
    }
    trace = write_trace(tmp_path / "golden.kvtrace", **given, prompt_tokens=FIRST)
    outcome, _ = replayed(trace, f"{CASES[method, name]},buffer={STEP}", BUDGET)
    published = arrays[name]
    assert len(outcome.retained) == published.shape[0] * published.shape[1]
    for kept in outcome.retained:
        assert kept.n_tokens == FIRST + STEP * kept.compression
        assert np.array_equal(kept.positions, published[kept.compression, kept.kv_head])
    # The scores that settle it are not those of the first compression alone.
    assert not np.array_equal(published[-1, 0], published[-2, 0])


def test_what_is_drawn_follows_the_attention(tmp_path, rng):
    keys = rng.normal(size=(6, 8)).astype(np.float32)
    asked = {"keys": keys, "positions": np.arange(6, dtype=np.int32), "values": keys, "scale": 1.0}
    asked |= {"queries": rng.normal(size=(1, 1, 8)).astype(np.float32), "n_tokens": 6, "prompt_tokens": 5}
    scorer = parse_policy("vase:window=1,sinks=0,large_share=0,kernel_size=1").scorer
    views = [CacheView(**asked, layer=0, kv_head=0, seed=seed, budget=3) for seed in range(4000)]
    orders = [np.argsort(-scorer.score(view)[:5]).tolist() for view in views]
    weights = leading_attention(views[0], 5)[0, 0]
    first = np.bincount([order[0] for order in orders], minlength=5) / len(orders)
    assert np.abs(first - weights).max() < 0.03
    # Without replacement: after the first, the others by what is left.
    likeliest = int(weights.argmax())
    seconds = [order[1] for order in orders if order[0] == likeliest]
    rest = np.where(np.arange(5) == likeliest, 0, weights) / (1 - weights[likeliest])
    assert np.abs(np.bincount(seconds, minlength=5) / len(seconds) - rest).max() < 0.05
