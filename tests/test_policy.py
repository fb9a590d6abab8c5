"""Policies are read from their names, with the papers' defaults, or refused in words."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import naive_rules
import pytest

from simulator.policies import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS, TRIGGERS
from simulator.policy import parse_policy, split_list
from traces.errors import InfeasibleBudgetError, UserError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rkv", ("rkv", "uniform", "uniform", "buffer-full")),
        ("pyramid-rkv", ("rkv", "pyramid", "uniform", "buffer-full")),
        ("reasonalloc", ("rkv", "wave", "utility", "buffer-full")),
        ("snapkv+utility", ("snapkv", "uniform", "utility", "buffer-full")),
        ("utility+snapkv+pyramid", ("snapkv", "pyramid", "utility", "buffer-full")),
        ("rkv+uniform+utility", ("rkv", "uniform", "utility", "buffer-full")),
        ("random-prompt:trigger=every-n", ("random-prompt", "uniform", "uniform", "every-n")),
        ("fullkv", ("fullkv", "uniform", "uniform", "never")),
    ],
)
def test_names_spell_the_parts(text, parts):
    policy = parse_policy(text)
    found = (policy.scorer.name, policy.layers.name, policy.heads.name, policy.trigger.name)
    assert found == parts
    assert policy.name == text.partition(":")[0]
    assert parse_policy(policy) is policy
    assert parse_policy(text) == policy


def test_defaults_are_the_papers():
    written = {item.name: item.default for item in fields(naive_rules.Rules)}
    special = {("streamingllm", "sinks"): 4, ("random", "recent"): 8, ("random-prompt", "recent"): 8}
    seen = set()
    for table in (SCORERS, LAYER_ALLOCATORS, HEAD_ALLOCATORS, TRIGGERS):
        for name, part in table.items():
            for item in fields(part):
                assert item.default == special.get((name, item.name), written[item.name]), (name, item.name)
                seen.add(item.name)
    assert seen == set(written) - {"scorer", "layers", "heads", "trigger"}


def test_parameters_reach_their_part():
    policy = parse_policy("reasonalloc:alpha=1,window=4,gamma=1.5,delta=64,buffer=32,redistribute=true")
    assert (policy.scorer.alpha, policy.scorer.window, policy.protected) == (1.0, 4, 4)
    assert (policy.layers.gamma, policy.heads.delta, policy.trigger.buffer) == (1.5, 64, 32)
    assert policy.redistribute is True
    parameters = json.loads(policy.parameters_json)
    assert parameters["alpha"] == 1.0
    assert parameters["trigger"] == "buffer-full"
    assert list(parameters) == sorted(parameters)


def test_overrides_apply_where_they_fit_and_yield_to_the_text():
    assert parse_policy("rkv", buffer=32).trigger.buffer == 32
    assert parse_policy("rkv:buffer=64", buffer=32).trigger.buffer == 64
    assert parse_policy("fullkv", buffer=32).trigger.name == "never"


def test_comma_lists_keep_parameters_with_their_policy():
    assert split_list("rkv:alpha=0.5,window=4,fullkv, snapkv") == [
        "rkv:alpha=0.5,window=4",
        "fullkv",
        "snapkv",
    ]
    assert split_list("a:x=1,b:y=2") == ["a:x=1", "b:y=2"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "allowed"),
        ("h2o", "'h2o' is unknown; allowed: fullkv"),
        ("rkv+snapkv", "'snapkv' is a second scorer"),
        ("rkv+wave+pyramid", "'pyramid' is a second layers"),
        ("reasonalloc+utility", "'utility' is a second heads"),
        ("wave+utility", "names no scorer"),
        ("rkv+", "'' is unknown"),
        ("rkv:lambda=1", "parameter 'lambda' is unknown; allowed: alpha"),
        ("streamingllm:window=4", "parameter 'window' is unknown"),
        ("rkv:alpha", "'alpha' is not a parameter"),
        ("rkv:alpha=", "'alpha=' is not a parameter"),
        ("rkv:=3", "'=3' is not a parameter"),
        ("rkv:alpha=2", "alpha is 2.0; allowed: 0 to 1"),
        ("rkv:alpha=nan", "alpha is nan"),
        ("rkv:alpha=high", "alpha is 'high'"),
        ("rkv:window=0", "window is 0; allowed: 1 or more"),
        ("rkv:window=2.5", "window is 2.5; allowed: a whole number"),
        ("rkv:window=true", "window is True"),
        ("rkv:kernel_size=4", "kernel_size is 4; allowed: an odd number"),
        ("rkv:group_reduce=sum", "allowed: max_logits, mean_weights, max_weights"),
        ("rkv:slot_order=random", "allowed: chronological, score"),
        ("rkv:no_match=row", "allowed: skip, column0"),
        ("rkv:similarity_threshold=1.5", "similarity_threshold is 1.5"),
        ("streamingllm:sinks=-1", "sinks is -1"),
        ("random:recent=-1", "recent is -1"),
        ("rkv:buffer=0", "buffer is 0; allowed: 1 or more"),
        ("rkv:prompt=keep", "allowed: compress, wait"),
        ("rkv:trigger=newline", "trigger is 'newline'; allowed: buffer-full, every-n"),
        ("rkv:interval=8", "parameter 'interval' is unknown"),
        ("rkv:trigger=every-n,interval=0", "interval is 0"),
        ("rkv:trigger=every-n,offset=-1", "offset is -1"),
        ("rkv+pyramid:pyramid_beta=0.5", "pyramid_beta is 0.5"),
        ("rkv+wave:gamma=nan", "gamma is nan"),
        ("rkv+wave:layer_floor=1.5", "layer_floor is 1.5"),
        ("rkv+wave:layer_cap=0.5", "layer_cap is 0.5"),
        ("rkv+utility:delta=0", "delta is 0"),
        ("rkv+utility:mu=-1", "mu is -1"),
        ("rkv+utility:beta=-1", "beta is -1"),
        ("rkv+utility:head_cap=0", "head_cap is 0"),
        ("rkv+utility:pooling=rank", "allowed: none, length"),
        ("rkv:redistribute=1", "redistribute is 1; allowed: true or false"),
    ],
)
def test_what_is_no_policy_is_refused_in_words(text, named):
    with pytest.raises(UserError) as refusal:
        parse_policy(text)
    assert refusal.value.exit_code == 2
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "protected"),
    [("rkv", 8), ("snapkv:window=3", 3), ("streamingllm", 4), ("random", 8), ("random-prompt:recent=0", 0)],
)
def test_budget_must_exceed_what_is_protected(text, protected):
    policy = parse_policy(text)
    policy.require_feasible(protected + 1)
    with pytest.raises(InfeasibleBudgetError, match=f"at least {protected + 1}") as refusal:
        policy.require_feasible(protected)
    assert refusal.value.exit_code == 5


def test_full_cache_needs_no_budget():
    parse_policy("fullkv").require_feasible(1)


def test_policy_is_a_frozen_value():
    policy = parse_policy("rkv")
    with pytest.raises(FrozenInstanceError):
        policy.name = "other"
    with pytest.raises(FrozenInstanceError):
        policy.scorer.alpha = 0.5
    assert hash(policy) == hash(parse_policy("rkv"))
