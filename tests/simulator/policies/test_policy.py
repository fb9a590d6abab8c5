"""Policies are read from their names, with the papers' defaults, or refused in words."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar

import naive_rules
import pytest

from simulator.policies.language import parse_policy, split_list
from simulator.policies.parts import HeadAllocator
from simulator.policies.shipped import ALIASES, HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS, TRIGGERS
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
        ("rkv+custom", ("rkv", "custom", "uniform", "buffer-full")),
        ("rkv+uniform+custom", ("rkv", "uniform", "custom", "buffer-full")),
        ("rkv+custom+custom:trigger=segment", ("rkv", "custom", "custom", "segment")),
        ("rkv+table+headkv:trigger=per-step", ("rkv", "table", "headkv", "per-step")),
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
    special = {(name, key): value for name, own in naive_rules.SPECIAL.items() for key, value in own.items()}
    seen = set()
    for table in (SCORERS, LAYER_ALLOCATORS, HEAD_ALLOCATORS, TRIGGERS):
        for name, part in table.items():
            for item in fields(part):
                assert item.default == special.get((name, item.name), written[item.name]), (name, item.name)
                seen.add(item.name)
    assert seen == set(written) - {"scorer", "layers", "heads", "trigger", "protect"}


def test_parameters_reach_their_part():
    policy = parse_policy("reasonalloc:alpha=1,window=4,gamma=1.5,delta=64,buffer=32,redistribute=true")
    assert (policy.scorer.alpha, policy.scorer.window, policy.protected_of(0, 99)) == (1.0, 4, 4)
    assert (policy.layers.gamma, policy.heads.delta, policy.trigger.buffer) == (1.5, 64, 32)
    assert policy.redistribute is True
    parameters = json.loads(policy.parameters_json)
    assert parameters["alpha"] == 1.0
    assert parameters["trigger"] == "buffer-full"
    assert list(parameters) == sorted(parameters)


@pytest.mark.parametrize(
    ("text", "told", "ends"),
    [
        ("rkv", "recent:8", (0, 8)),
        ("lagkv:prompt=keep,lag=4", "sinks:4+prompt", (50, 0)),
        ("rkv:protect=none", "none", (0, 0)),
        ("rkv:protect=recent:64+prompt", "prompt+recent:64", (50, 64)),
        ("rkv:protect=sinks:60+prompt", "sinks:60+prompt", (60, 0)),
        ("h2o:protect=boundary:12.5%+recent:3", "boundary:12.5%+recent:3", (12, 12)),
        ("h2o:protect=sinks:4", "sinks:4", (4, 0)),
    ],
)
def test_protection_is_an_axis_of_its_own(text, told, ends):
    policy = parse_policy(text)
    assert (str(policy.protection), policy.protection.ends(50, 100)) == (told, ends)
    assert policy.protected_of(50, 100) == sum(ends)
    stated = json.loads(policy.parameters_json).get("protect")
    assert stated == (told if "protect" in text else None)
    if "boundary" not in text:  # a share of a budget always leaves some of it
        with pytest.raises(InfeasibleBudgetError, match=rf"at least {sum(ends) + 1}"):
            policy.require_feasible(sum(ends), 50)
    policy.require_feasible(sum(ends) + 1, 50)


def test_what_the_paper_protects_needs_no_name():
    assert parse_policy("rkv:protect=recent:8") == parse_policy("rkv")
    assert parse_policy("random:protect=sinks:0+recent:8") == parse_policy("random")
    assert parse_policy("rkv:protect=recent:8,window=4").protect is not None


def test_aliases_carry_parameters_and_the_users_own_win():
    code = parse_policy("rkv-code")
    assert (code.scorer.alpha, code.scorer.slot_order, code.scorer.no_match) == (0.07, "score", "column0")
    mine = parse_policy("rkv-code+utility:alpha=0.2,buffer=16", window=4)
    assert (mine.name, mine.scorer.alpha, mine.scorer.window) == ("rkv-code+utility", 0.2, 4)
    assert (mine.scorer.slot_order, mine.heads.name, mine.trigger.buffer) == ("score", "utility", 16)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_says_what_its_meaning_says(alias):
    named, written = parse_policy(alias), parse_policy(ALIASES[alias])
    assert named.parts == written.parts
    assert named.name == alias


@dataclass(frozen=True)
class OwnHeads(HeadAllocator):
    name: ClassVar[str] = "own"
    window: int = 3

    def allocate(self, request):
        raise NotImplementedError


def test_a_parameter_of_two_parts_can_be_set_for_one(monkeypatch):
    monkeypatch.setitem(HEAD_ALLOCATORS, "own", OwnHeads)
    policy = parse_policy("rkv+own")
    assert (policy.parameters["window"], policy.parameters["heads.window"]) == (8, 3)
    both = parse_policy("rkv+own:window=4")
    assert (both.scorer.window, both.heads.window, "heads.window" in both.parameters) == (4, 4, False)
    one = parse_policy("rkv+own:window=4,heads.window=2")
    assert (one.scorer.window, one.heads.window, one.parameters["heads.window"]) == (4, 2, 2)
    with pytest.raises(UserError, match=r"parameter 'layers\.window' is unknown"):
        parse_policy("rkv+own:layers.window=2")


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
        ("a\0b", r"policy 'a\x00b' has characters that cannot be printed"),
        ("h3o", "'h3o' is unknown; did you mean 'h2o'? see sim policies list"),
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
        ("h2o:recent_share=1.5", "recent_share is 1.5; allowed: 0 to 1"),
        ("vatp:recent_share=-1", "recent_share is -1"),
        ("vatp:sinks=-1", "sinks is -1"),
        ("tova:recent=-1", "recent is -1"),
        ("keydiff:recent=-1", "recent is -1"),
        ("knorm:recent=-1", "recent is -1"),
        ("recency:sinks=-1", "sinks is -1"),
        ("snapkv-paper:window=0", "window is 0"),
        ("snapkv-paper:kernel_size=2", "kernel_size is 2; allowed: an odd number"),
        ("snapkv-paper:pool=sum", "allowed: max, avg"),
        ("snapkv-paper:slot_order=random", "allowed: chronological, score"),
        ("snapkv-paper:group_reduce=mean_weights", "parameter 'group_reduce' is unknown"),
        ("criticalkv:pool=sum", "allowed: max, avg"),
        ("criticalkv:first_stage_share=2", "first_stage_share is 2.0; allowed: 0 to 1"),
        ("criticalkv:epsilon=-1", "epsilon is -1"),
        ("lagkv:lag=0", "lag is 0"),
        ("lagkv:sinks=-1", "sinks is -1"),
        ("lagkv:score_source=values", "allowed: both, keys"),
        ("expected-attention:window=0", "window is 0"),
        ("expected-attention:sinks=-1", "sinks is -1"),
        ("expected-attention:n_future=0", "n_future is 0"),
        ("expected-attention:epsilon=-1", "epsilon is -1"),
        ("append-only:rate=0", "rate is 0.0; allowed: above 0, up to 1"),
        ("append-only:window=0", "window is 0"),
        ("rkv:buffer=0", "buffer is 0; allowed: 1 or more"),
        ("rkv:prompt=half", "allowed: compress, wait, keep"),
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
        ("rkv:protect=head", "protect has 'head'; allowed: none, or prompt, sinks:N, recent:N, boundary:P%"),
        ("rkv:protect=prompt:4", "protect has 'prompt:4'"),
        ("rkv:protect=none+prompt", "protect has 'none'"),
        ("rkv:protect=sinks:-1", "protect has 'sinks:-1'"),
        ("rkv:protect=recent:2000000000", "protect has 'recent:2000000000'"),
        ("rkv:protect=sinks:4+sinks:4", "protect is 'sinks:4+sinks:4', with sinks twice"),
        ("rkv:protect=boundary:50%", "allowed: a boundary below 50%"),
        ("rkv:protect=boundary:10", "protect has 'boundary:10'"),
        ("rkv:protect=1", "protect has '1'"),
        ("rkv+pyramid-code:code_beta=0", "code_beta is 0; allowed: 1 or more"),
        ("rkv+pyramid-code:pyramid_beta=3", "parameter 'pyramid_beta' is unknown"),
        ("rkv+wave-dynamic:layer_delta=-1", "layer_delta is -1; allowed: 0 or more"),
        ("rkv+wave-dynamic:demand_window=0", "demand_window is 0"),
        ("rkv+wave-dynamic:rho=1", "rho is 1.0; allowed: between 0 and 1"),
        ("rkv+wave-dynamic:gamma=5", "gamma is 5.0"),
        ("rkv+wave-dynamic:layer_floor=-1", "layer_floor is -1"),
        ("rkv+wave-dynamic:layer_cap=0", "layer_cap is 0"),
        ("rkv+cake:cake_window=0", "cake_window is 0"),
        ("rkv+cake:tau1=0", "tau1 is 0.0; allowed: 0.1 to 10"),
        ("rkv+cake:tau2=nan", "tau2 is nan"),
        ("rkv+squeeze:squeeze_share=2", "squeeze_share is 2.0; allowed: 0 to 1"),
        ("rkv+table:head_beta=0.9", "head_beta is 0.9; allowed: 1 or more"),
        ("rkv+headkv:head_beta=inf", "head_beta is inf"),
        ("rkv+custom:layer_shares=4/0", "layer_shares is '4/0'; allowed: numbers above 0 joined by /"),
        ("rkv+uniform+custom:head_shares=1/inf", "head_shares is '1/inf'"),
        ("rkv+custom:head_shares=1/2", "parameter 'head_shares' is unknown"),
        ("rkv+adakv:form=pooled", "form is 'pooled'; allowed: blend, floor"),
        ("rkv+adakv:uniform_share=1.1", "uniform_share is 1.1; allowed: 0 to 1"),
        ("rkv+duo:streaming_share=-1", "streaming_share is -1"),
        ("rkv+duo:stream_budget=2", "stream_budget is 2.0; allowed: 0 to 1"),
        ("rkv:trigger=per-step,buffer=2", "parameter 'buffer' is unknown"),
        ("rkv:trigger=per-step,prompt=half", "allowed: compress, wait, keep"),
        ("rkv:trigger=segment,segment=word", "segment is 'word'; allowed: newline, or token ids joined by /"),
        ("rkv:trigger=segment,prompt=half", "allowed: compress, wait, keep"),
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
    [
        ("rkv", 8),
        ("snapkv:window=3", 3),
        ("streamingllm", 4),
        ("random", 8),
        ("random-prompt:recent=0", 0),
        ("h2o", 0),
        ("tova:recent=1", 1),
        ("snapkv-paper", 32),
        ("criticalkv:window=5", 5),
        ("lagkv", 4),
        ("expected-attention", 4),
        ("vatp", 20),
        ("recency", 0),
        ("append-only", 8),
    ],
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
