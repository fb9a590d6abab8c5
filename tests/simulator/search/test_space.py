"""What a search draws: policies and budgets that can be read, inside their ranges."""

from __future__ import annotations

from itertools import product

import optuna
import pytest

from simulator.policies.language import parse_policy
from simulator.policies.ranges import Choices
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS
from simulator.search.space import DEFAULT_PARTS, make_space, read_ranges, write_policy
from traces.errors import UserError

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
        named = [name for table in parts.values() for part in table.values() for name in part.searched]
        assert sorted(name for name, *_ in found) == sorted(named)
        outside = set()
        for name, default, allowed in found:
            inside = (
                default in allowed.values
                if isinstance(allowed, Choices)
                else allowed.low <= default <= allowed.high
            )
            outside |= set() if inside else {(name, default)}
        # Meant for thousands of tokens.
        assert outside == {("window", 256), ("sinks", 20)}

    def test_a_part_of_ones_own_is_turned_as_far_as_it_says(self, tmp_path):
        path = tmp_path / "mine.py"
        path.write_text(
            "from dataclasses import dataclass\n"
            "from simulator.policies import Range, Scorer\n\n\n"
            "@dataclass(frozen=True)\n"
            "class Mine(Scorer):\n"
            "    name = 'mine'\n"
            "    searched = {'power': Range(2, 5)}\n"
            "    power: int = 3\n"
            "    other: int = 1\n\n"
            "    def score(self, view):\n"
            "        return view.positions.astype('float32')\n"
        )
        space = make_space(PARTS | {"scorer": [f"{path}:Mine"]}, ["64"], {"buffer": 5}, None)
        policies = [space.parse(space.suggest(trial)[0]) for trial in random_trials(40)]
        assert {policy.scorer.power for policy in policies} == {2, 3, 4, 5}
        assert {policy.scorer.other for policy in policies} == {1}

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

    def test_ranges_of_no_part_are_refused(self, tmp_path):
        path = tmp_path / "ranges.toml"
        path.write_text("alhpa = [0.1]")
        with pytest.raises(UserError, match="'alhpa' is unknown; allowed: alpha"):
            make_space(PARTS, ["64"], {}, path)

    def test_what_has_no_range_has_to_be_at_its_default(self, space):
        assert space.coordinates("rkv:no_match=column0", "64") is None
        with pytest.raises(UserError, match="buffer is 64; allowed: 5, as of all policies"):
            space.parse("rkv:buffer=64")
