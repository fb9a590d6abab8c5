"""Searches as a user runs them: they find, repeat, resume, and refuse in words."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import optuna
import polars as pl
import pytest
from judges import made_judge
from naive_traces import small_trace
from optuna.trial import TrialState

from simulator.search import judge as judging
from simulator.search import study as studying
from simulator.search import workers
from simulator.search.judge import Worth
from simulator.search.study import count_trials, whole_trials
from traces.lock import locked
from validate.cli.options import asked_cells


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


def test_what_is_searched_may_be_the_shift_of_traces_with_sensitivities(tmp_path, run_sim):
    for i in range(4):
        small_trace(tmp_path / f"{i}.kvtrace", seed=i, n_tokens=40 + i, n_draws=2, dtype="float32")
    small_trace(tmp_path / "without.kvtrace", seed=9, n_tokens=40, dtype="float32")
    asked = ["search", "--metric", "shift_mean", "--scorers", "recency,snapkv", "--layers", "uniform"]
    asked += [
        "--heads",
        "uniform",
        "--against",
        "recency",
        "--buffer",
        4,
        "-b",
        16,
        "--trials",
        3,
        "--jobs",
        1,
    ]
    asked += ["--out", tmp_path / "out"] + [
        part for i in (0, 1) for part in ("-t", tmp_path / f"{i}.kvtrace")
    ]
    judging = [part for i in (2, 3) for part in ("--held-out", tmp_path / f"{i}.kvtrace")]
    code, out, err = run_sim(*asked, *judging)
    assert code == 0, err
    assert "judged by shift_mean (less is better)" in out
    verdicts = pl.read_parquet(tmp_path / "out" / "verdicts.parquet")
    rows = pl.read_parquet(tmp_path / "out" / "held-out.parquet")
    base = verdicts.filter(role="base").row(0, named=True)
    assert base["held_out"] == pytest.approx(rows.filter(policy="recency")["shift_mean"].mean())
    # The same traces, with sensitivities of other draws.
    for i in (0, 1):
        small_trace(tmp_path / f"again-{i}.kvtrace", seed=i, n_tokens=40 + i, n_draws=3, dtype="float32")
    asked[-4:] = []
    again = [part for i in (0, 1) for part in ("-t", tmp_path / f"again-{i}.kvtrace")]
    code, _, err = run_sim(*asked, *again, *judging)
    assert code == 2
    assert "holds a search with other traces; allowed: the same, or another --out" in err
    code, _, err = run_sim(*asked, "-t", tmp_path / "without.kvtrace", *judging)
    assert code == 4
    assert "without.kvtrace has no sensitivities; allowed: traces of sim record --sensitivity" in err


class TestSearch:
    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_one_process_repeats_exactly(self, asked, tmp_path, run_sim):
        found = []
        for name in ("one", "two"):
            assert run_sim(*asked, "--out", tmp_path / name, "--trials", 12, "--jobs", 1, "-q")[0] == 0
            trials = optuna.load_study(
                study_name="kvbudget", storage=f"sqlite:///{tmp_path / name / 'study.db'}"
            ).trials
            found.append([(own.params, own.values) for own in trials])
        assert found[0] == found[1]

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_another_question_is_refused(self, asked, run_sim):
        assert run_sim(*asked, "--trials", 5, "--jobs", 1)[0] == 0
        code, _, err = run_sim(*asked, "--trials", 5, "--metric", "miss_rate")
        assert code == 2
        assert "holds a search with other metric; allowed: the same, or another --out" in err

    @pytest.mark.slow
    def test_two_processes_share_a_study(self, asked, tmp_path, run_sim):
        assert run_sim(*asked, "--trials", 14, "--jobs", 2)[0] == 0
        counts = count_trials(tmp_path / "out" / "study.db")
        assert 14 <= counts["judged"] + counts["failed"] <= 15

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_starts_that_wait_are_no_trials_yet(self, asked, run_sim, tmp_path):
        assert run_sim(*asked, "--trials", 3, "--jobs", 1)[0] == 0
        counts = count_trials(tmp_path / "out" / "study.db")
        assert counts["judged"] == 3

    @pytest.mark.slow
    def test_a_worker_that_dies_is_one_line(self, asked, run_sim, monkeypatch):
        monkeypatch.setattr(workers, "search", _die)
        code, _, err = run_sim(*asked, "--jobs", 2)
        assert code == 1
        assert "a search process was killed" in err
        assert len(err.splitlines()) == 1

    @pytest.mark.slow
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
