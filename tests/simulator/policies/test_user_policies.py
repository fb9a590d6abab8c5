"""A user's own policy, from a file or an installed package: it runs, says where it is from, or why not."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
from hashlib import sha256
from importlib.metadata import EntryPoint

import pytest

from simulator.cells import run_replay
from simulator.policies import plugins as user_policies
from simulator.policies.language import parse_policy, split_list
from simulator.results.terminal import _changed_parameters
from traces.errors import UserError

HEAD = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import HeadAllocator, LayerAllocator, Scorer, Trigger
"""
SCORER = (
    HEAD
    + '''

@dataclass(frozen=True)
class MyScorer(Scorer):
    """Score a key by its norm.

    Attributes
    ----------
    alpha : float
        Weight of the norm.
    recent : int
        Latest entries kept.

    Notes
    -----
    Made for a test.
    """

    name: ClassVar[str] = "mine"
    alpha: float = 0.5
    recent: int = 4

    def score(self, view):
        return self.alpha * np.linalg.norm(view.keys, axis=-1)
'''
)
HEADS = '''

@dataclass(frozen=True)
class MyHeads(HeadAllocator):
    """All that is not protected to the first head."""

    name: ClassVar[str] = "my-heads"
    delta: int = 3

    def allocate(self, request):
        budgets = np.full(request.n_heads, request.protected + 1)
        budgets[0] += request.total - budgets.sum()
        return budgets, False
'''
LAYERS = '''

@dataclass(frozen=True)
class MyLayers(LayerAllocator):
    """Nine tenths to the first layer."""

    name: ClassVar[str] = "my-layers"

    def allocate(self, request):
        budgets = np.full(request.n_layers, request.protected + 1)
        budgets[0] += request.n_layers * request.entries - budgets.sum()
        return budgets, False
'''
TRIGGER = '''

@dataclass(frozen=True)
class MyTrigger(Trigger):
    """Compress every few tokens."""

    name: ClassVar[str] = "my-trigger"
    every: int = 7

    def next_compression(self, n_tokens, n_entries, total, n_kv_heads):
        return n_tokens + self.every
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write ``mine.py`` with one part of every kind in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(SCORER + HEADS + LAYERS + TRIGGER)
    return path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mine.py:MyScorer", ("MyScorer", "UniformLayers", "UniformHeads", "BufferFull")),
        ("mine.py:MyScorer:alpha=0.3", ("MyScorer", "UniformLayers", "UniformHeads", "BufferFull")),
        (
            "./mine.py:MyScorer+wave+utility:alpha=0.3",
            ("MyScorer", "WaveLayers", "UtilityHeads", "BufferFull"),
        ),
        ("rkv+mine.py:MyHeads:delta=5,buffer=8", ("RKV", "UniformLayers", "MyHeads", "BufferFull")),
        (
            "mine.py:MyHeads+mine.py:MyScorer+mine.py:MyLayers",
            ("MyScorer", "MyLayers", "MyHeads", "BufferFull"),
        ),
        ("rkv:trigger=mine.py:MyTrigger,every=3", ("RKV", "UniformLayers", "UniformHeads", "MyTrigger")),
    ],
)
def test_a_class_of_a_file_stands_where_a_name_can(own, text, parts):
    policy = parse_policy(text)
    assert tuple(type(part).__name__ for part in policy.parts.values()) == parts
    assert text.startswith(policy.name)
    assert parse_policy(text) == policy
    if "alpha" in text:
        assert policy.scorer.alpha == 0.3
    assert policy.parameters["source"] == f"mine.py {sha256(own.read_bytes()).hexdigest()[:12]}"
    assert "source" not in parse_policy("rkv").parameters


def test_lists_keep_files_and_their_parameters_together():
    text = "a/b.py:X:alpha=1,w=2,rkv,c.py:Y+wave,rkv:buffer=3,trigger=d.py:T,every=2, snapkv"
    assert split_list(text) == [
        "a/b.py:X:alpha=1,w=2",
        "rkv",
        "c.py:Y+wave",
        "rkv:buffer=3,trigger=d.py:T,every=2",
        "snapkv",
    ]


def test_an_edited_file_is_another_policy(own):
    before = parse_policy("mine.py:MyScorer")
    own.write_text(own.read_text().replace("self.alpha *", "2 * self.alpha *"))
    after = parse_policy("mine.py:MyScorer")
    assert before != after
    assert before.parameters["source"] != after.parameters["source"]
    assert not list(own.parent.glob("__pycache__"))


def replayed_elsewhere(policy, path):
    table = run_replay([path], [policy], [14]).table
    return policy.parameters_json, table["mass_mean"].item(), table["status"].item()


@pytest.mark.slow
def test_a_policy_survives_the_way_to_another_process(own, make_trace):
    policy = parse_policy("mine.py:MyScorer+mine.py:MyHeads:alpha=0.3,trigger=mine.py:MyTrigger,every=5")
    path = make_trace().path
    here = replayed_elsewhere(policy, path)
    assert here[2] == "ok"
    own.write_text("what was asked for is what runs, whatever becomes of the file")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(replayed_elsewhere, (policy, path)) == here
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_the_command_runs_a_file_of_ones_own(own, make_trace, run_sim):
    trace = make_trace(n_tokens=90, prompt_tokens=30).path
    policies = "mine.py:MyScorer+mine.py:MyLayers+mine.py:MyHeads:recent=2,rkv:trigger=mine.py:MyTrigger,rkv"
    arguments = ["replay", "--trace", trace, "-b", "14", "-p", policies]
    code, out, err = run_sim(*arguments, "--format", "json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["policy"] for row in rows] == [
        "mine.py:MyScorer+mine.py:MyLayers+mine.py:MyHeads",
        "rkv",
        "rkv",
    ]
    assert json.loads(rows[0]["policy_params"])["source"].startswith("mine.py ")
    assert json.loads(rows[1]["policy_params"])["trigger"] == "mine.py:MyTrigger"
    code, out, _ = run_sim(*arguments)
    assert code == 0
    assert "mine.py:MyScorer+mine.py:MyLayers+mine.py:MyHeads:recent=2" in out
    assert " rkv:trigger=mine.py:MyTrigger " in out


def test_results_outlive_the_file(own, make_trace):
    rows = run_replay([make_trace()], ["mine.py:MyScorer:alpha=0.25"], [14]).table.to_dicts()
    assert _changed_parameters(rows[0]) == {"alpha": 0.25}
    own.unlink()
    assert _changed_parameters(rows[0])["alpha"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "text", "words"),
    [
        (None, "mine.py:MyScorer", ["file mine.py is missing"]),
        (SCORER + HEADS, "mine.py:Scorr", ["has no class 'Scorr'", "MyScorer, MyHeads"]),
        (SCORER, "mine.py:Scorer", ["has no class 'Scorer'"]),
        ("x = 1", "mine.py:X", ["no class 'X'; allowed: none"]),
        (SCORER, "mine.py", ["names a file and no class", "mine.py:CLASS"]),
        (SCORER, "mine.py:alpha=0.3", ["names a file and no class"]),
        ("class X: pass", "mine.py:X", ["Scorer, LayerAllocator, HeadAllocator, Trigger"]),
        ("import no_such_module", "mine.py:X", ["mine.py, line 1", "ModuleNotFoundError"]),
        ("x = 1\ndef f(:\n", "mine.py:X", ["mine.py, line 2", "SyntaxError"]),
        ("x = 1\n\ny = 1 / 0", "mine.py:X", ["mine.py, line 3", "ZeroDivisionError"]),
        ("import sys\nsys.exit('bye')", "mine.py:X", ["mine.py, line 2", "SystemExit: bye"]),
        ("\0", "mine.py:X", ["mine.py"]),
        (SCORER.replace("@dataclass(frozen=True)", ""), "mine.py:MyScorer", ["no frozen dataclass"]),
        (SCORER.replace("(frozen=True)", ""), "mine.py:MyScorer", ["no frozen dataclass"]),
        (SCORER.replace("recent: int = 4", "recent: int"), "mine.py:MyScorer", ["'recent' has no default"]),
        (SCORER.replace("float = 0.5", "tuple = ()"), "mine.py:MyScorer", ["'alpha' is a tuple"]),
        (SCORER.replace('name: ClassVar[str] = "mine"', ""), "mine.py:MyScorer", ["has no name"]),
        (SCORER.replace("ClassVar[str]", "str"), "mine.py:MyScorer", ["'name' cannot be a parameter"]),
        (SCORER.replace("alpha: float", "source: float"), "mine.py:MyScorer", ["'source' cannot be"]),
        (SCORER.replace("def score", "def scores"), "mine.py:MyScorer", ["does not define score"]),
        (SCORER.replace("recent: int = 4", "recent: int = -4"), "mine.py:MyScorer", ["recent is -4"]),
        (SCORER.replace("recent: int = 4", "recent: float = 4.5"), "mine.py:MyScorer", ["recent is 4.5"]),
        (SCORER, "mine.py:MyScorer:alpha=high", ["alpha is 'high'"]),
        (SCORER, "mine.py:MyScorer:beta=1", ["parameter 'beta' is unknown; allowed: alpha"]),
        (SCORER, "mine.py:MyScorer+rkv", ["'rkv' is a second scorer"]),
        (SCORER + TRIGGER, "rkv+mine.py:MyTrigger", ["is a trigger; allowed: as a parameter"]),
        (SCORER, "rkv:trigger=mine.py:MyScorer", ["is a scorer; allowed: a trigger"]),
        (SCORER + HEADS, "mine.py:MyHeads", ["names no scorer"]),
        (SCORER + TRIGGER, "fullkv:trigger=mine.py:MyTrigger", ["allowed: never"]),
    ],
)
def test_what_is_no_policy_is_one_line_and_exit_2(
    content, text, words, tmp_path, monkeypatch, make_trace, run_sim
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    code, out, err = run_sim("replay", "--trace", make_trace().path, "-p", text, "-b", "14")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err


def faulty(base, method, body):
    """Give a file whose part of a kind does something wrong."""
    return f"""{HEAD}

@dataclass(frozen=True)
class Bad({base}):
    name: ClassVar[str] = "bad"
    {"delta: int = 1" if base == "HeadAllocator" else ""}

    def {method}:
        {body}
"""


SCORE, ALLOCATE = "score(self, view)", "allocate(self, request)"
QUOTA = "score(self, view): return view.positions\n    def quota(self, budget, n_tokens)"
NEXT = "next_compression(self, n_tokens, n_entries, total, n_kv_heads)"
FIRES = NEXT + ": return 50\n    def fires_on(self, token_ids)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method", "body", "words"),
    [
        ("Scorer", SCORE, "raise KeyError('two\\nlines')", "scorer 'bad' raised KeyError"),
        ("Scorer", SCORE, "return np.full(view.n_entries, np.nan)", "scorer 'bad' returned nan"),
        (
            "Scorer",
            SCORE,
            "return np.ones(view.n_entries) * 1j",
            "no numbers: of type complex128; allowed: real",
        ),
        ("Scorer", SCORE, "return np.ma.ones(view.n_entries)", "scorer 'bad' returned scores with a mask"),
        ("Scorer", SCORE, "return np.full(view.n_entries, 1e300)", "scorer 'bad' returned inf"),
        ("Scorer", SCORE, "raise GeneratorExit", "scorer 'bad' raised GeneratorExit"),
        ("Scorer", SCORE, "raise SystemExit(0)", "scorer 'bad' raised SystemExit"),
        ("Scorer", SCORE, "raise BaseException('x')", "scorer 'bad' raised BaseException: x"),
        (
            "HeadAllocator",
            ALLOCATE,
            "return np.ma.array([14, 14], mask=[0, 1]), False",
            "gave budgets with a mask",
        ),
        ("HeadAllocator", ALLOCATE, "return np.array([14, 14j]), False", "of type complex128"),
        ("HeadAllocator", ALLOCATE, "raise GeneratorExit", "allocator 'bad' raised GeneratorExit"),
        ("Scorer", SCORE, "return np.zeros(3)", "scorer 'bad' returned scores of shape (3,)"),
        ("Scorer", SCORE, "return None", "scorer 'bad' returned scores that are no numbers"),
        ("Scorer", SCORE, "view.keys[:] = 0", "scorer 'bad' raised ValueError"),
        ("HeadAllocator", ALLOCATE, "return np.full(request.n_heads, 9), False", "exactly 28"),
        ("HeadAllocator", ALLOCATE, "return np.zeros(request.n_heads) / 1, False", "whole numbers"),
        ("HeadAllocator", ALLOCATE, "raise ValueError('no')", "allocator 'bad' raised ValueError: no"),
        ("HeadAllocator", ALLOCATE, "return 5", "allocator 'bad' raised TypeError"),
        (
            "HeadAllocator",
            "allocate(self, request): pass\n    def table(self, request)",
            "return 1 / 0",
            "(mine.py,",
        ),
        ("LayerAllocator", ALLOCATE, "return np.full(request.n_layers, 99), False", "exactly 28"),
        ("LayerAllocator", ALLOCATE, "raise ValueError('no')", "allocator 'bad' raised ValueError: no"),
        ("Trigger", NEXT, "return n_tokens + 0.5", "trigger 'bad' gave"),
        ("Trigger", NEXT, "return n_tokens", "trigger 'bad' gave"),
        ("Trigger", NEXT, "return -1", "trigger 'bad' gave -1 as the next compression"),
        ("Trigger", NEXT, "return 1 / 0", "trigger 'bad' raised ZeroDivisionError"),
        ("Trigger", NEXT, "return True", "trigger 'bad' gave True"),
        ("Trigger", FIRES, "return 1 / 0", "trigger 'bad' raised ZeroDivisionError"),
        ("Trigger", FIRES, "return [True]", "trigger 'bad' fires on bool of shape (1,)"),
        ("Scorer", SCORE, "raise SystemExit(3)", "scorer 'bad' raised SystemExit: 3"),
        ("Scorer", QUOTA, "return 2 * budget", "scorer 'bad' gave a quota of 28 at 20 tokens"),
        ("Scorer", QUOTA, "return -1", "allowed: a whole number from 0 to the budget, 14"),
        ("Scorer", QUOTA, "return budget / 2", "gave a quota of 7.0"),
        ("Scorer", QUOTA, "return 1 / 0", "scorer 'bad' raised ZeroDivisionError"),
        (
            "Scorer",
            "score(self, view): pass\n    def score_layer(self, layer, memory=None)",
            "return None",
            "raised TypeError",
        ),
        (
            "HeadAllocator",
            ALLOCATE,
            "return [[1], [2, 3]], False",
            "allocator 'bad' gave budgets that are no numbers",
        ),
        ("HeadAllocator", ALLOCATE, "return np.ones(2), np.ones(2)", "allocator 'bad' raised ValueError"),
    ],
)
def test_a_part_that_breaks_its_contract_fails_its_own_cell(
    base, method, body, words, tmp_path, monkeypatch, make_trace, run_sim
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(faulty(base, method, body))
    kinds = {"Scorer": "mine.py:Bad", "Trigger": "rkv:trigger=mine.py:Bad"}
    policy = kinds.get(base, "rkv+mine.py:Bad")
    trace = make_trace().path
    code, out, err = run_sim(
        "replay", "--trace", trace, "-p", f"{policy},rkv", "-b", "14", "--format", "json"
    )
    assert code == 1
    rows = json.loads(out)
    assert [row["status"] for row in rows] == ["error", "ok"]
    assert words in rows[0]["error"]
    assert "\n" not in rows[0]["error"]
    told, count = err.splitlines()
    assert words in told
    assert count == "sim: 1 of 2 cells failed"


def test_errors_of_our_own_are_not_put_into_a_cell(make_trace, monkeypatch):
    monkeypatch.setattr("simulator.cells.measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_replay([make_trace()], ["rkv"], [14])


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Pretend that a package is installed that offers a scorer, and one that is not there."""
    (tmp_path / "their_package.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"theirs": "their_package:MyScorer", "broken": "their_package:Gone"}
    points = [EntryPoint(name, value, user_policies.ENTRY_POINTS) for name, value in names.items()]
    monkeypatch.setattr(user_policies, "entry_points", lambda group: points)
    user_policies.installed.cache_clear()
    yield
    user_policies.installed.cache_clear()
    sys.modules.pop("their_package", None)


def test_installed_packages_offer_policies_by_name(offered, make_trace, run_sim):
    policy = parse_policy("theirs+utility:alpha=0.3")
    assert policy.scorer.alpha == 0.3
    assert policy.parameters["source"].startswith("their_package.py ")
    assert run_replay([make_trace()], [policy], [14]).exit_code == 0
    with pytest.raises(UserError, match="policy 'broken' of package"):
        parse_policy("broken")
    code, out, _ = run_sim("policies", "list")
    assert code == 0
    assert "scorer: Score a key by its norm. [their_package:MyScorer]" in out
    assert "their_package:Gone raised AttributeError" in " ".join(out.split())


def test_a_file_of_ones_own_is_shown(own, run_sim):
    for name in ("MyScorer", "MyHeads", "MyLayers", "MyTrigger"):
        code, out, _ = run_sim("policies", "show", f"mine.py:{name}")
        assert code == 0
        assert f": mine.py:{name}\n" in out
        assert "code: mine.py " in out
    code, out, _ = run_sim("policies", "show", "mine.py:MyScorer+wave:alpha=0.3")
    assert code == 0
    for words in ("alpha = 0.3 (default 0.5)", "Weight of the norm.", "Made for a test.", "needs: a wave"):
        assert words in out
