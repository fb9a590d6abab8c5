"""What a search concludes: the front, the candidates, and verdicts trace by trace."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from simulator.search.judge import Worth
from simulator.search.study import Tried
from simulator.search.verdict import candidates, front, judge_held_out
from traces.errors import UserError


def tried(metric, memory, budget="20%", policy="rkv"):
    return Tried(policy, budget, Worth(metric, memory))


class TestVerdict:
    def test_the_front_is_what_none_dominates(self):
        rng = np.random.default_rng(3)
        some = [tried(float(m), float(b)) for m, b in rng.integers(0, 12, (60, 2))]
        expected = {
            (own.worth.metric, own.worth.memory)
            for own in some
            if not any(
                other.worth != own.worth
                and other.worth.metric <= own.worth.metric
                and other.worth.memory <= own.worth.memory
                for other in some
            )
        }
        found = front(some, 1)
        assert set(zip(found["metric"], found["bytes_mean"], strict=True)) == expected
        assert found["bytes_mean"].is_sorted()

    def test_candidates_hold_no_more_memory_than_the_base(self):
        some = [tried(0.1, 120.0), tried(0.3, 100.5), tried(0.2, 90.0), tried(0.0, 80.0, budget="30%")]
        chosen = candidates(some, Worth(0.5, 100.0), "20%", 1, n=5)
        assert [own.worth.metric for own in chosen] == [0.2, 0.3]

    @pytest.mark.parametrize(
        ("shift", "verdict"), [(-0.02, "better"), (0.02, "worse"), (0.0, "not told apart")]
    )
    def test_a_verdict_is_of_differences_trace_by_trace(self, shift, verdict):
        rng = np.random.default_rng(1)
        base = rng.random(20)
        own = base + shift + rng.normal(0, 0.01, 20) - (rng.normal(0, 0.01, 20).mean() if not shift else 0)
        rows = pl.DataFrame(
            [
                {
                    "asked_policy": policy,
                    "asked_budget": "20%",
                    "status": "ok",
                    "trace_id": str(i),
                    "miss_rate": float(values[i]),
                    "bytes_mean": memory,
                }
                for policy, values, memory in (("rkv", base, 100), ("snapkv", own, 98))
                for i in range(20)
            ]
        )
        chosen = [("base", tried(0.5, 100.0)), ("winner", tried(0.4, 98.0, policy="snapkv"))]
        found = judge_held_out(rows, chosen, "rkv", "miss_rate").row(1, named=True)
        assert found["verdict"] == verdict
        assert found["difference"] == pytest.approx((own - base).mean())
        assert found["difference_low"] < found["difference"] < found["difference_high"]
        assert found["memory_to_base"] == pytest.approx(-0.02)
        (one,) = judge_held_out(rows.filter(trace_id="0"), chosen[1:], "rkv", "miss_rate")["verdict"]
        assert one == "not told apart"
        failing = pl.when((pl.col("asked_policy") == "snapkv") & (pl.col("trace_id") == "3"))
        rows = rows.with_columns(failing.then(pl.lit("error")).otherwise("status").alias("status"))
        assert judge_held_out(rows, chosen, "rkv", "miss_rate")["verdict"].to_list() == ["", "failed"]
        rows = rows.with_columns(trace=pl.lit("t"), error=pl.lit("too small"))
        with pytest.raises(UserError, match="snapkv at 20%, t: too small"):
            judge_held_out(rows, chosen, "snapkv", "miss_rate")
