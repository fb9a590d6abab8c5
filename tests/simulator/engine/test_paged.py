"""What a paged cache would hold, counted position by position."""

from __future__ import annotations

import io

import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from traces.errors import UserError

POLICIES = ["fullkv", "recency:buffer=3", "random:buffer=5", "rkv+pyramid+utility:buffer=4,delta=8"]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_block_table_for_all_heads(policy, make_trace):
    trace = make_trace(n_layers=3)
    row = run_replay([trace], [policy], [14], block=5, seed=2).table.row(0, named=True)
    (outcome,) = Engine([Request(trace, parse_policy(policy), 14, seed=2)]).run()
    of_any, in_blocks = [], []
    for position in range(20, 60):
        held = [
            {own for own in range(position + 1) if head[own] > position}
            for layer in outcome.evicted_at
            for head in layer
        ]
        assert sum(map(len, held)) == outcome.held[position - 20]
        of_any.append(len(set().union(*held)))
        in_blocks.append(-(-max(map(len, held)) // 5) * 5)
    per_position = 3 * 2 * 32  # six KV heads; an entry is a key and a value of 8 numbers of 2 bytes
    for name, counts in (("union", of_any), ("paged", in_blocks)):
        assert row[f"bytes_{name}_mean"] == round(sum(counts) / 40 * per_position)
        assert row[f"bytes_{name}_peak"] == max(counts) * per_position
    assert row["bytes_union_mean"] >= row["bytes_mean"]
    assert row["block"] == 5


def test_heads_that_keep_the_same_need_no_more_than_one(make_trace):
    row = run_replay([make_trace()], ["recency:buffer=3"], [14], block=1).table.row(0, named=True)
    assert row["bytes_union_mean"] == row["bytes_paged_mean"] == row["bytes_mean"]


def test_rows_that_tell_nothing_of_their_policy_say_so(make_trace):
    policies = ["fullkv", "recency:buffer=3", "recency:buffer=500,prompt=wait"]
    table = run_replay([make_trace()], policies, [14]).table
    assert table["control"].to_list() == ["full cache", None, "nothing evicted"]


def test_a_block_has_tokens(make_trace, run_sim):
    with pytest.raises(UserError, match="--block is 0; allowed: 1 to 1048576 tokens"):
        run_replay([make_trace()], ["recency"], [14], block=0)
    asked = ["replay", "-t", make_trace().path, "-p", "random", "-b", 14, "--buffer", 4, "--format", "csv"]
    code, out, _ = run_sim(*asked, "--block", 64)
    assert code == 0
    assert pl.read_csv(io.StringIO(out))["bytes_paged_peak"].item() == 64 * 2 * 2 * 32


@pytest.mark.parametrize("policy", ["recency:buffer=4", "streamingllm:buffer=4,sinks=0", "random:buffer=4"])
def test_after_any_number_of_compressions_recency_still_keeps_the_newest(policy, make_trace):
    trace = make_trace(n_tokens=90)
    result = run_replay([trace], [f"{policy},protect=none"], [12], keep_retained=True)
    kept = result.retained.group_by("layer", "kv_head", "n_tokens").agg("position")
    assert kept["n_tokens"].n_unique() > 10
    newest = [
        set(positions) == set(range(n_tokens - 12, n_tokens))
        for n_tokens, positions in kept.select("n_tokens", "position").iter_rows()
    ]
    assert all(newest) if "random" not in policy else not any(newest[1:])


@pytest.mark.parametrize(
    "policy", ["snapkv:window=1", "rkv:window=1", "snapkv-paper:window=1", "h2o:recent_share=0"]
)
def test_without_recent_entries_sinks_and_nearly_no_window(policy, make_trace):
    row = run_replay([make_trace()], [f"{policy},buffer=1,protect=none"], [1]).table.row(0, named=True)
    assert (row["status"], row["entries_peak"]) == ("ok", 2.0)
