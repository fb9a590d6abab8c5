"""How a search judges a policy: by replays of some traces, against a base."""

from __future__ import annotations

from fractions import Fraction

import pytest
from judges import made_judge

from simulator.cells import run_replay
from simulator.engine.sampling import Sampling
from simulator.policies.language import parse_policy
from simulator.search import judge as judging
from simulator.search.judge import Worth, in_turns
from traces.errors import UserError


class TestJudge:
    @pytest.mark.parametrize("metric", ["mass_mean", "lost_lookup_rms", "lost_lookup_peak"])
    def test_on_the_highest_rung_worth_is_the_mean_of_a_replay(self, make_trace, metric):
        judge = made_judge(make_trace, metric)
        policy = parse_policy("snapkv:buffer=5")
        table = run_replay(judge.traces, [policy], ["40%"]).table
        worth = judge.worth(policy, "40%", -1)
        assert worth.metric == pytest.approx(table[metric].mean())
        assert worth.memory == pytest.approx(table["bytes_mean"].mean())

    def test_below_only_the_difference_to_the_base_counts(self, make_trace):
        judge = made_judge(make_trace)
        policy, base = parse_policy("snapkv:buffer=5"), parse_policy("streamingllm:buffer=5")
        few = judge.traces[:2]
        sampling = Sampling(Fraction(1, 2))
        own, others = (
            run_replay(few, [each], ["40%"], sampling=sampling).table["mass_mean"] for each in (policy, base)
        )
        whole = run_replay(judge.traces, [base], ["40%"]).table["mass_mean"]
        expected = whole.mean() + (own - others).mean()
        assert judge.worth(policy, "40%", 1).metric == pytest.approx(expected)
        assert judge.worth(base, "40%", 0).metric == pytest.approx(whole.mean())

    def test_what_cannot_be_replayed_is_refused(self, make_trace):
        with pytest.raises(UserError, match="snapkv at 3"):
            made_judge(make_trace).worth(parse_policy("snapkv"), "3", 0)

    def test_little_is_kept_of_the_full_cache_where_little_fits(self, make_trace, monkeypatch):
        judge = made_judge(make_trace)
        policy = parse_policy("snapkv:buffer=5")
        expected = judge.worth(policy, "40%", -1)
        assert len(judge._prepared) == 4
        monkeypatch.setattr(judging, "_PREPARED_BYTES", 0)
        assert judge.worth(parse_policy("snapkv:buffer=5,window=4"), "40%", 1) != expected
        assert len(judge._prepared) == 1
        assert judge.worth(policy, "40%", -1) == expected

    def test_families_take_turns(self, make_trace):
        traces = [make_trace(task={"family": family}) for family in "aaabbc"]
        assert [own.manifest.task["family"] for own in in_turns(traces)] == list("abcaba")

    @pytest.mark.parametrize("sign", [1, -1])
    def test_better_in_one_and_no_worse_in_the_other_dominates(self, sign):
        one = Worth(sign * 0.2, 10.0)
        assert one.dominates(Worth(sign * 0.3, 10.0), sign)
        assert one.dominates(Worth(sign * 0.2, 11.0), sign)
        assert not one.dominates(one, sign)
        assert not one.dominates(Worth(sign * 0.1, 11.0), sign)
