"""Searches: what is drawn, how it is judged, that they resume, and what they conclude."""

from __future__ import annotations

import json
import os
import shutil
from fractions import Fraction
from itertools import product

import numpy as np
import optuna
import polars as pl
import pytest
from optuna.trial import TrialState

from simulator.cells import run_replay
from simulator.engine.sampling import Sampling
from simulator.policies.language import parse_policy
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS
from simulator.search import judge as judging
from simulator.search import study as studying
from simulator.search import workers
from simulator.search.judge import Judge, Worth, in_turns
from simulator.search.space import DEFAULT_PARTS, RANGES, Choices, make_space, read_ranges, write_policy
from simulator.search.study import Tried, count_trials, whole_trials
from simulator.search.verdict import candidates, front, judge_held_out
from traces.errors import UserError
from traces.lock import locked
from validate.cli.options import asked_cells

PARTS = {"scorer": ["rkv", "snapkv"], "layers": ["uniform", "pyramid"], "heads": ["uniform", "utility"]}


@pytest.fixture
def space():
    return make_space({}, ["20%", "64"], {"buffer": 5}, None)


def random_trials(n, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(n)]


class TestSpace:
    def test_all_that_is_drawn_can_be_read_and_lies_where_it_was_drawn(self, space):
        seen = set()
        for trial in random_trials(300):
            text, budget = space.suggest(trial)
            policy = space.parse(text)
            assert policy.parameters["buffer"] == 5
            seen.add((policy.scorer.name, policy.layers.name, policy.heads.name))
            found = space.coordinates(text, budget)
            for name, value in trial.params.items():
                assert found[name] == (pytest.approx(value, rel=1e-3) if type(value) is float else value)
        assert seen == set(product(*DEFAULT_PARTS.values()))

    def test_defaults_are_inside_and_go_without_saying(self, space):
        coordinates = space.coordinates("rkv+uniform+utility", "64")
        assert coordinates["rkv.alpha"] == 0.1
        assert space.suggest(optuna.trial.FixedTrial(coordinates)) == ("rkv+utility", "64")
        assert space.coordinates("h2o", "64") is None
        assert space.coordinates("rkv:alpha=0", "64") is None

    def test_every_range_is_of_a_parameter_and_holds_its_default(self):
        parts = {"scorer": SCORERS, "layers": LAYER_ALLOCATORS, "heads": HEAD_ALLOCATORS}
        searched = {
            role: [name for name in table if name not in ("fullkv", "custom")]
            for role, table in parts.items()
        }
        space = make_space(searched, ["64"], {}, None)
        found = [
            own for role in searched for part in space.parts[role] for own in space.parameters(role, part)
        ]
        assert {name for name, _ in found} == set(RANGES)
        outside = set()
        for name, default in found:
            allowed = RANGES[name]
            inside = (
                default in allowed.values
                if isinstance(allowed, Choices)
                else allowed.low <= default <= allowed.high
            )
            outside |= set() if inside else {(name, default)}
        # Meant for thousands of tokens.
        assert outside == {("window", 256), ("sinks", 20)}

    def test_uniform_allocators_go_without_saying_unless_a_name_would_mislead(self):
        parts = {"scorer": "rkv", "layers": "uniform", "heads": "custom"}
        text = write_policy(parts, {"head_shares": "1/2"})
        assert text == "rkv+uniform+custom:head_shares=1/2"
        assert parse_policy(text).layers.name == "uniform"
        assert write_policy(parts | {"heads": "uniform"}, {}) == "rkv"

    def test_ranges_of_the_user_go_first(self, tmp_path):
        path = tmp_path / "ranges.toml"
        path.write_text(
            "alpha = [0.1, 0.2]\nwindow = { low = 4, high = 8 }\nmu = { low = 0.1, high = 0.2 }\n"
        )
        space = make_space(PARTS, ["64"], {}, path)
        for trial in random_trials(40):
            space.suggest(trial)
            assert trial.params.get("rkv.alpha", 0.1) in (0.1, 0.2)
            assert 4 <= trial.params.get("snapkv.window", 4) <= 8
            assert 0.1 <= trial.params.get("utility.mu", 0.1) <= 0.2

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("alpha = 0.1", "alpha is 0.1; allowed: a list of values"),
            ("alpha = { low = 2, high = 1 }", "alpha is"),
            ("alpha = { low = 1 }", "alpha is"),
            ("alpha = [", "not valid TOML"),
            ("alpha = { low = 0, high = 1, log = true }", "log = true above 0"),
            ('alpha = { low = 0, high = 1, step = "x" }', "a step of whole numbers"),
            ("alpha = { low = 0, high = 1, step = 0 }", "a step of whole numbers"),
        ],
    )
    def test_wrong_ranges_are_refused(self, tmp_path, text, said):
        path = tmp_path / "ranges.toml"
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_ranges(path)


def made_judge(make_trace, metric="mass_mean", n=4):
    traces = [make_trace(n_tokens=90 + i, task={"family": "ab"[i % 2]}) for i in range(n)]
    base = parse_policy("streamingllm:buffer=5")
    return Judge(traces, metric, base, waves={}, seed=0)

    def test_ranges_of_no_part_are_refused(self, tmp_path):
        path = tmp_path / "ranges.toml"
        path.write_text("alhpa = [0.1]")
        with pytest.raises(UserError, match="'alhpa' is unknown; allowed: alpha"):
            make_space(PARTS, ["64"], {}, path)

    def test_what_has_no_range_has_to_be_at_its_default(self, space):
        assert space.coordinates("rkv:no_match=column0", "64") is None
        with pytest.raises(UserError, match="buffer is 64; allowed: 5, as of all policies"):
            space.parse("rkv:buffer=64")


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


@pytest.fixture
def asked(make_trace, tmp_path):
    """Give the command of a small search."""
    for i in range(8):
        make_trace(n_tokens=80 + i)
    paths = sorted(tmp_path.glob("*.kvtrace"))
    options = ["--scorers", "rkv,snapkv", "--layers", "uniform,pyramid", "--heads", "uniform,utility"]
    options += [
        "--against",
        "rkv",
        "--also",
        "snapkv",
        "--buffer",
        "5",
        "-b",
        "40%,50%",
        "--out",
        tmp_path / "out",
    ]
    for path in paths[:5]:
        options += ["-t", path]
    for path in paths[5:]:
        options += ["--held-out", path]
    return ["search", *options]


class TestSearch:
    def test_a_search_finds_confirms_and_writes(self, asked, tmp_path, run_sim):
        code, out, err = run_sim(*asked, "--trials", 16, "--jobs", 1)
        assert (code, err) == (
            0,
            f"wrote {tmp_path / 'out' / 'winners.json'}, for sim validate live --configs\n",
        )
        assert "On 3 held-out traces, against rkv" in out
        counts = count_trials(tmp_path / "out" / "study.db")
        assert counts["judged"] + counts["failed"] == 16
        assert 0 < counts["whole"] < counts["judged"]
        entries = json.loads((tmp_path / "out" / "winners.json").read_text())
        roles = [entry["role"] for entry in entries if entry["budget"] == "40%"]
        assert roles[0] == "base"
        assert roles[1] == "winner"
        assert "published" in roles
        cells = asked_cells(None, None, tmp_path / "out" / "winners.json", None)
        assert {policy.parameters["buffer"] for policy, _ in cells} == {5}
        rows = pl.read_parquet(tmp_path / "out" / "held-out.parquet")
        assert rows["trace_id"].n_unique() == 3
        # The starts were tried first.
        first = whole_trials(tmp_path / "out" / "study.db")[:2]
        assert {own.policy for own in first} <= {"rkv", "snapkv"}

    def test_one_process_repeats_exactly(self, asked, tmp_path, run_sim):
        found = []
        for name in ("one", "two"):
            assert run_sim(*asked, "--out", tmp_path / name, "--trials", 12, "--jobs", 1, "-q")[0] == 0
            trials = optuna.load_study(
                study_name="kvbudget", storage=f"sqlite:///{tmp_path / name / 'study.db'}"
            ).trials
            found.append([(own.params, own.values) for own in trials])
        assert found[0] == found[1]

    def test_a_killed_search_goes_on(self, asked, tmp_path, run_sim, monkeypatch):
        def killed(*arguments):
            raise SystemError

        with monkeypatch.context() as patched:
            patched.setattr(studying, "_climb", killed)
            with pytest.raises(SystemError):
                run_sim(*asked, "--trials", 9, "--jobs", 1)
        assert run_sim(*asked, "--trials", 9, "--jobs", 1)[0] == 0
        trials = optuna.load_study(study_name="kvbudget", storage=f"sqlite:///{tmp_path}/out/study.db").trials
        assert len(trials) == 9
        assert trials[0].state == TrialState.FAIL
        assert TrialState.RUNNING not in {trial.state for trial in trials}

    def test_another_question_is_refused(self, asked, run_sim):
        assert run_sim(*asked, "--trials", 5, "--jobs", 1)[0] == 0
        code, _, err = run_sim(*asked, "--trials", 5, "--metric", "miss_rate")
        assert code == 2
        assert "holds a search with other metric; allowed: the same, or another --out" in err

    def test_two_processes_share_a_study(self, asked, tmp_path, run_sim):
        assert run_sim(*asked, "--trials", 14, "--jobs", 2)[0] == 0
        counts = count_trials(tmp_path / "out" / "study.db")
        assert 14 <= counts["judged"] + counts["failed"] <= 15

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--metric", "gap"), "--metric is 'gap'; allowed: lost_lookup_peak"),
            (("--minutes", "-1"), "--minutes is -1.0; allowed: 0 or more"),
            (("--scorers", "rvk"), "'rvk' is unknown"),
            (("--layers", "utility"), "--layers: 'utility' is another kind of part"),
            (("--scorers", "reasonalloc"), "--scorers: 'reasonalloc' is another kind of part, or several"),
            (("--against", "rvk"), "'rvk' is unknown"),
            (("-b", "0.1"), "0.1"),
            (("--minutes", "0"), "has no trial on all traces yet"),
            (("--also", "rkv:buffer=64"), "buffer is 64; allowed: 5"),
        ],
    )
    def test_mistakes_are_one_line(self, asked, run_sim, options, said):
        code, _, err = run_sim(*asked, *options, "--jobs", 1)
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1

    def test_traces_that_are_chosen_on_do_not_judge(self, asked, run_sim, tmp_path):
        code, _, err = run_sim(*asked, "--held-out", tmp_path / "made-0.kvtrace")
        assert code == 2
        assert "--held-out has made-0.kvtrace, which policies are chosen on" in err

    def test_a_copy_of_a_trace_counts_once(self, asked, run_sim, tmp_path):
        shutil.copytree(tmp_path / "made-7.kvtrace", tmp_path / "copy.kvtrace")
        arguments = [*asked, "--held-out", tmp_path / "copy.kvtrace", "--trials", 6, "--jobs", 1]
        code, out, _ = run_sim(*arguments)
        assert code == 0
        assert "On 3 held-out traces" in out

    def test_two_searches_do_not_share_a_folder(self, asked, run_sim, tmp_path):
        (tmp_path / "out").mkdir()
        with locked(tmp_path / "out", wait=False):
            code, _, err = run_sim(*asked, "--trials", 5, "--jobs", 1)
        assert code == 2
        assert "another search runs there" in err

    def test_starts_that_wait_are_no_trials_yet(self, asked, run_sim, tmp_path):
        assert run_sim(*asked, "--trials", 3, "--jobs", 1)[0] == 0
        counts = count_trials(tmp_path / "out" / "study.db")
        assert counts["judged"] == 3

    def test_a_worker_that_dies_is_one_line(self, asked, run_sim, monkeypatch):
        monkeypatch.setattr(workers, "_search", _die)
        code, _, err = run_sim(*asked, "--jobs", 2)
        assert code == 1
        assert "a search process was killed" in err
        assert len(err.splitlines()) == 1

    def test_a_start_that_two_processes_took_counts_once(self, asked, run_sim, tmp_path, monkeypatch):
        plain = studying._climb

        def overtaken(study, *arguments):
            worths = plain(study, *arguments)
            first = study.trials[0]
            if first.state == TrialState.RUNNING:
                other = optuna.trial.Trial(study, first._trial_id)
                other.set_user_attr("worths", [vars(worth) for worth in worths])
                study.tell(other, [0.0, 1.0])
            return worths

        monkeypatch.setattr(studying, "_climb", overtaken)
        assert run_sim(*asked, "--trials", 6, "--jobs", 1)[0] == 0
        assert count_trials(tmp_path / "out" / "study.db")["judged"] == 6

    def test_a_file_that_is_no_study_is_refused(self, asked, run_sim, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "study.db").write_text("something else " * 100)
        code, _, err = run_sim(*asked, "--trials", 5, "--jobs", 1)
        assert code == 2
        assert "is no study of a search" in err

    def test_few_trials_climb(self, make_trace, monkeypatch):
        """Of many that are judged on a few traces, about a third are judged on more."""
        monkeypatch.setattr(judging.Judge, "worth", lambda self, policy, budget, rung: None)
        study = optuna.create_study(directions=["minimize", "minimize"])
        judge = made_judge(make_trace, "miss_rate", n=1)
        rng = np.random.default_rng(0)
        heights = []
        for _ in range(200):
            trial = study.ask()
            worth = Worth(float(rng.random()), float(rng.random()))
            worths = studying._climb(study, judge, lambda rung, own=worth: own, "20%")
            trial.set_user_attr("budget", "20%")
            trial.set_user_attr("worths", [{"metric": own.metric, "memory": own.memory} for own in worths])
            study.tell(trial, [0.0, 0.0])
            heights.append(len(worths))
        assert 0.25 < np.mean(np.array(heights) > 1) < 0.45
        assert 0.05 < np.mean(np.array(heights) > 2) < 0.3


def _die(*arguments):
    os._exit(9)


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
