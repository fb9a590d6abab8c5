"""Demand, its stability, head masses and names, checked against slow loops; the charts they end in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from simulator.engine.demand import calibrate
from simulator.engine.full_cache import sampled_steps
from traces.errors import UserError
from validate.problems.families import FAMILIES, make_problem
from validate.reasoner import charts, heads, profile

SHAPE = {"n_layers": 2, "n_kv_heads": 2, "group_size": 2, "head_dim": 8}
PROMPTS = {
    "walk": "<bos> walk ku dead ; fu bi ; mi ku ; bi mi ; Bi fu ; legs M1 bi C1 #6 M2 end care2 think",
    "program": "<bos> program ki 7 ma 5 ; L1 ki R1 ma ; L2 loop legs M1 ki C1 #9 M2 end care0 think",
}
UNIFORM = dict.fromkeys(heads.PATTERNS, 0.05)


@pytest.fixture
def make_run(make_trace, rng):
    """Write a trace of a prompt and ``n`` words drawn from it; queries and keys are random."""

    def make(family="walk", index=0, n=50, **options):
        prompt = PROMPTS[family].split()
        words = [*prompt, *rng.choice(prompt, n).tolist()]
        vocabulary = sorted(set(words))
        return make_trace(
            **SHAPE,
            n_tokens=len(words),
            prompt_tokens=len(prompt),
            scale=1.0,
            token_ids=[vocabulary.index(word) for word in words],
            vocabulary={i: f" {word}" for i, word in enumerate(vocabulary)},
            task={"id": f"{family}-{index}", "family": family},
            **options,
        )

    return make


def slow_weights(trace, layer, head, position):
    """Softmax of one query over its causal keys, in double precision, without the stored log-sum-exp."""
    query = trace.queries(layer)[head, position].astype(float)
    keys = trace.keys(layer)[head // trace.shape.group_size].astype(float)
    logits = [trace.scale * float(query @ keys[j]) for j in range(position + 1)]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def in_pattern(pattern, words, n_prompt, t, j):
    """Say by the definition whether key ``j`` is in a pattern of query ``t``."""
    goal = words.index("legs") <= j <= words.index("end")
    return {
        "sink": j == 0,
        "previous": j == t - 1,
        "itself": j == t,
        "induction": 1 <= j <= t - 1 and words[j - 1] == words[t],
        "duplicate": j < t and words[j] == words[t],
        "goal": goal,
        "recent": t - 15 <= j <= t - 2,
        "prompt": 0 < j < n_prompt and not goal,
    }[pattern]


@pytest.mark.parametrize(("family", "dtype"), [("walk", "bfloat16"), ("program", "float32")])
def test_head_masses_are_those_of_slow_loops(make_run, monkeypatch, family, dtype):
    monkeypatch.setattr(heads, "_BLOCK_ELEMENTS", 4 * 100 * 3)  # blocks of a few steps
    traces = [make_run(family, n=40, dtype=dtype), make_run(family, 1, n=23, dtype=dtype)]
    found = heads.mean_masses(traces, 8)
    assert found.n_steps == 16
    expected, uniform = np.zeros((2, 4, len(heads.PATTERNS))), np.zeros(len(heads.PATTERNS))
    for trace in traces:
        words, n_prompt = trace.text().split(), trace.prompt_tokens
        for step in sampled_steps(trace.total_tokens - n_prompt, 8).tolist():
            t = n_prompt + step
            members = [
                [j for j in range(t + 1) if in_pattern(pattern, words, n_prompt, t, j)]
                for pattern in heads.PATTERNS
            ]
            uniform += [len(keys) / (t + 1) / 16 for keys in members]
            for layer in range(2):
                for head in range(4):
                    weights = slow_weights(trace, layer, head, t)
                    expected[layer, head] += [sum(weights[j] for j in keys) / 16 for keys in members]
    np.testing.assert_allclose(found.mass, expected, atol=2e-6)
    np.testing.assert_allclose(found.uniform, uniform, atol=1e-12)
    assert (expected > 0).all()  # no pattern passed for want of members


def test_goal_is_what_the_prompt_asks_for():
    assert not heads.goal_positions(["17", "4"]).any()
    legs = ["<bos>", "machine", "Ge", "na", "legs", "M1", "front", "end", "queue", ":", "ge", "think"]
    assert heads.goal_positions(legs).nonzero()[0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_prompt_has_a_goal(family):
    goal = heads.goal_positions(make_problem(family, 5, 0).prompt.split())
    assert 3 < goal.sum() < len(goal) / 2


def test_a_token_without_text_is_its_id(make_trace):
    trace = make_trace(token_ids=[0, 1, 2, *range(3, 60)], vocabulary={0: " a", 1: "\n"})
    assert heads.token_words(trace)[:3] == ["a", "\\n", "2"]


def test_demand_is_the_slow_count_and_that_of_the_wave(make_run):
    trace = make_run(n=30)
    found = profile.measure_demand(trace, 0.8, 5)
    entries, share = np.zeros((2, 2)), np.zeros((2, 2))
    for step in sampled_steps(30, 5).tolist():
        t = trace.prompt_tokens + step
        for layer in range(2):
            for kv_head in range(2):
                pair = [slow_weights(trace, layer, 2 * kv_head + i, t) for i in range(2)]
                weights = sorted(((a + b) / 2 for a, b in zip(*pair, strict=True)), reverse=True)
                count = next(n for n in range(1, t + 2) if sum(weights[:n]) >= 0.8)
                entries[layer, kv_head] += count
                share[layer, kv_head] += count / (t + 1)
    np.testing.assert_array_equal(found.entries, entries)
    np.testing.assert_allclose(found.share, share)
    wave = calibrate([trace], 0.8, 5)
    np.testing.assert_allclose(found.entries / 5, wave.head_demand, atol=5e-4)


def test_correlation_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 4, 2, 3, 1: covariance -4.5, squares 4.5 and 5.
    assert profile.correlation(np.array([1.0, 5, 5, 9]), np.array([8.0, 2, 3, 1])) == pytest.approx(
        -4.5 / math.sqrt(4.5 * 5)
    )
    assert profile.correlation(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert profile.correlation(np.ones(3), np.arange(3.0)) is None


@pytest.mark.parametrize(
    ("masses", "name"),
    [
        ({"sink": 0.4}, "sink"),
        ({"sink": 0.39}, "mixed"),
        ({"previous": 0.45, "recent": 0.9}, "previous token"),
        ({"induction": 0.5, "previous": 0.45, "prompt": 0.8}, "induction"),
        ({"duplicate": 0.6, "goal": 0.6}, "duplicate token"),
        ({"goal": 0.7, "prompt": 0.1}, "goal"),
        ({"itself": 0.41}, "itself"),
        ({"prompt": 0.51, "recent": 0.5}, "prompt"),
        ({"prompt": 0.49}, "mixed"),
    ],
)
def test_names_follow_the_rules(masses, name):
    assert heads.name_head(dict.fromkeys(heads.PATTERNS, 0.0) | masses, UNIFORM) == name


def test_a_head_that_looks_at_everything_has_no_name():
    masses = dict.fromkeys(heads.PATTERNS, 0.0) | {"prompt": 0.6}
    assert heads.name_head(masses, UNIFORM) == "prompt"
    assert heads.name_head(masses, UNIFORM | {"prompt": 0.5}) == "mixed"


def test_a_planted_head_is_found_named_and_drawn(make_trace, rng):
    n_tokens, n_prompt = 40, 10
    angles = np.arange(n_tokens)[:, None] * np.array([0.9, 0.37])
    turning = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    before = np.concatenate([np.cos(angles - [0.9, 0.37]), np.sin(angles - [0.9, 0.37])], axis=1)
    queries, keys = rng.normal(size=(2, 4, n_tokens, 4)), np.tile(turning, (2, 2, 1, 1))
    queries[1, 2] = 30 * before  # every query is largest on the key before it
    trace = make_trace(arrays=(queries, keys), prompt_tokens=n_prompt, scale=1.0, dtype="float32")
    found = profile.profile_traces([trace])
    rows = [row for row in found["heads"]["rows"] if row["name"] == "previous token"]
    assert [(row["layer"], row["head"]) for row in rows] == [(1, 2)]
    assert found["heads"]["layers"][1]["previous token"] == 0.25
    (drawn,) = [head for head in found["maps"]["heads"] if head["name"] == "previous token"]
    assert drawn["queries"]["positions"] == list(range(16, 40))
    weights = np.zeros((24, n_tokens))
    weights[:, drawn["keys"]["positions"]] = drawn["weights"]
    assert weights[np.arange(24), np.arange(15, 39)].min() > 0.9
    expected = [slow_weights(trace, 1, 2, t) + [0.0] * (n_tokens - 1 - t) for t in range(16, 40)]
    np.testing.assert_allclose(weights, expected, atol=heads.MAP_WEIGHT)


def demand_of(family, problem, value, n_steps=1):
    entries = n_steps * np.asarray(value, float)
    return profile.Demand(family, problem, 1, n_steps, entries, entries / 100)


def test_stability_tells_families_and_problems_apart():
    rising, falling = np.array([[1, 2], [3, 4], [5, 6.0]]), np.array([[6, 5], [4, 3], [2, 1.0]])
    families = profile.by_family(
        [
            demand_of("other", "c", falling),
            demand_of("walk", "a", rising),
            demand_of("walk", "b", 3 * rising, 2),
            demand_of("walk", "b", 3 * rising, 6),  # the same problem again
        ]
    )
    assert list(families) == ["walk", "other"]
    assert [problem.n_steps for problem in families["walk"]] == [1, 8]
    described = profile.describe_demand(families)["walk"]
    assert (described["traces"], described["problems"], described["steps"]) == (3, 2, 9)
    np.testing.assert_allclose(described["entries"], rising * 25 / 9, atol=1e-3)
    stability = profile.describe_stability(families, splits=10)
    assert stability["between"] == [{"families": ["walk", "other"], "heads": -1.0, "layers": -1.0}]
    assert stability["within"]["walk"]["heads"] == {"mean": 1.0, "p5": 1.0, "p95": 1.0}
    assert stability["within"]["other"] == {"problems": 1, "splits": 0, "heads": None, "layers": None}
    # Means m and 3 m: a standard deviation of sqrt(2) m over a mean of 2 m.
    assert stability["variation"]["walk"]["entries"] == pytest.approx([1 / math.sqrt(2)] * 3, abs=1e-4)
    assert stability["variation"]["other"] is None


@pytest.mark.slow
def test_commands_write_the_profile_and_two_pictures(make_run, run_sim, tmp_path, monkeypatch):
    for name in ("SPECIFIC_MASS", "TIMES_UNIFORM"):
        monkeypatch.setattr(heads, name, 0.01)  # random heads have names, too
    for family in ("walk", "program"):
        for index in range(2):
            make_run(family, index, n=20)
    out = tmp_path / "profile.json"
    written = run_sim("reasoner", "profile", "--traces", tmp_path, "--out", out, "--steps", 6)
    assert written == (0, f"wrote {out}\n", "")
    stored = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert list(stored["demand"]) == ["walk", "program"]
    assert stored["demand"]["walk"]["steps"] == 12
    assert stored["maps"]["family"] == "walk"
    assert stored["maps"]["heads"]
    assert run_sim("reasoner", "charts", "--profile", out, "--out", tmp_path / "svg")[0] == 0
    words = {}
    for name in ("demand-profile", "attention-maps"):
        path = tmp_path / "svg" / f"{name}.svg"
        assert path.stat().st_size < 400_000
        words[name] = " ".join(ElementTree.parse(path).getroot().itertext())
    assert "program" in words["demand-profile"]
    assert stored["maps"]["heads"][0]["name"] in words["attention-maps"]


def test_what_cannot_be_profiled_or_drawn_is_refused(make_trace, make_run, run_sim, tmp_path):
    with pytest.raises(UserError, match="no decode step"):
        profile.profile_traces([make_trace(prompt_tokens=60)])
    with pytest.raises(UserError, match="several models"):
        profile.profile_traces([make_run(), make_run(model="another")])
    with pytest.raises(UserError, match="rho is 1"):
        profile.profile_traces([make_run()], rho=1)
    asked = ["reasoner", "profile", "--traces", tmp_path / "none", "--out", tmp_path / "a.json"]
    code, _, err = run_sim(*asked)
    assert code == 3
    assert "not found" in err
    assert len(err.splitlines()) == 1
    (tmp_path / "other.json").write_text('{"format": "other"}')
    asked = ["reasoner", "charts", "--profile", tmp_path / "other.json", "--out", tmp_path / "svg"]
    assert run_sim(*asked) == (
        2,
        "",
        f"sim: --profile {tmp_path / 'other.json'}: format is 'other'; allowed: 'kvbudget-profile'\n",
    )
    with pytest.raises(UserError, match="no head has a name"):
        charts.map_chart({"maps": {"heads": []}})


@pytest.mark.slow
def test_a_profile_needs_no_torch():
    script = "import sys, validate.reasoner.profile; print('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False"]
