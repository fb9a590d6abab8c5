"""Calls that are not meant for an evicting cache are refused in one line."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from calling import AMPLE, CACHES, KINDS, N_PROMPT, OTHER, PROMPT, generate, loop, made, outcome
from transformers import DynamicCache

from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.eviction.cache import EvictingCache, evicting


def forgotten(model, cache):
    return generate(model, PROMPT)


def forgotten_by_hand(model, cache):
    return loop(model, PROMPT, DynamicCache(config=model.config))


def without_a_cache(model, cache):
    return loop(model, PROMPT, None)


def through_the_inner_model(model, cache):
    states = model.model(PROMPT, past_key_values=DynamicCache(config=model.config)).last_hidden_state
    return [[int(model.lm_head(states)[0, -1].argmax())]]


def no_use_of_a_cache(model, cache):
    return generate(model, PROMPT, past_key_values=cache, use_cache=False)


def twice_without_a_cache(model, cache):
    return [model(PROMPT, use_cache=False).logits[0, -1].argmax().view(1).tolist() for _ in range(2)]


def guided(model, cache):
    return generate(model, PROMPT, past_key_values=cache, guidance_scale=1.5)


def another_cache(model, cache):
    return generate(model, PROMPT, past_key_values=copy.deepcopy(cache))


def another_cache_by_hand(model, cache):
    return loop(model, PROMPT, copy.deepcopy(cache))


def beams(model, cache):
    return generate(model, PROMPT, past_key_values=cache, num_beams=2)


def assisted(model, cache):
    return generate(model, PROMPT, past_key_values=cache, prompt_lookup_num_tokens=3)


def attentions(model, cache):
    return model(PROMPT, past_key_values=cache, output_attentions=True).attentions


def four_dimensions(model, cache):
    mask = torch.zeros(1, 1, N_PROMPT, N_PROMPT).masked_fill(
        torch.ones(N_PROMPT, N_PROMPT).triu(1).bool(), -1e9
    )
    return loop(model, PROMPT, cache, 1, attention_mask=mask)


def padding_behind(model, cache):
    mask = torch.ones_like(PROMPT)
    mask[:, -3:] = 0
    return generate(model, PROMPT, past_key_values=cache, attention_mask=mask)


def positions_that_stay(model, cache):
    loop(model, PROMPT, cache, 1)
    return model(PROMPT[:, :1], past_key_values=cache, position_ids=torch.tensor([[0]]))


def a_mask_of_the_new_tokens(model, cache):
    loop(model, PROMPT, cache, 1)
    return model(PROMPT[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1))


def what_was_read_hidden(model, cache):
    loop(model, PROMPT, cache, 1)
    mask = torch.ones(1, N_PROMPT + 2)
    mask[0, 5] = 0
    return model(PROMPT[:, :1], past_key_values=cache, attention_mask=mask)


def no_tokens(model, cache):
    return model(PROMPT[:, :0], past_key_values=cache)


REFUSED_WITHIN = {
    call.__name__: call
    for call in (
        *(forgotten, forgotten_by_hand, without_a_cache, through_the_inner_model, no_use_of_a_cache),
        *(twice_without_a_cache, guided, another_cache, another_cache_by_hand, beams, assisted, attentions),
        *(four_dimensions, padding_behind, no_tokens),
    )
}
# Looked at where it does not make a device wait.
REFUSED_ON_THE_HOST = {
    call.__name__: call for call in (positions_that_stay, a_mask_of_the_new_tokens, what_was_read_hidden)
}


@pytest.mark.parametrize("call", REFUSED_WITHIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", CACHES)
def test_calls_that_are_not_meant_for_the_cache_are_refused(models, where, kind, call):
    model = models[kind]
    cache = CACHES[where](model)
    with evicting(model, cache):
        assert isinstance(outcome(lambda: REFUSED_WITHIN[call](model, cache)), str)


@pytest.mark.parametrize("call", REFUSED_ON_THE_HOST)
@pytest.mark.parametrize("kind", KINDS)
def test_later_passes_that_do_not_continue_are_refused(models, kind, call):
    model = models[kind]
    cache = CACHES["host"](model)
    with evicting(model, cache):
        assert isinstance(outcome(lambda: REFUSED_ON_THE_HOST[call](model, cache)), str)


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", CACHES)
def test_a_cache_outside_of_evicting_is_refused(models, where, kind, by_hand):
    model = models[kind]
    cache = CACHES[where](model)
    call = loop if by_hand else generate
    given = (model, PROMPT, cache) if by_hand else (model, PROMPT)
    named = {} if by_hand else {"past_key_values": cache}
    assert "outside of evicting" in outcome(lambda: call(*given, **named))
    with evicting(model, cache):
        assert not isinstance(outcome(lambda: call(*given, **named)), str)
    assert "outside of evicting" in outcome(lambda: call(model, OTHER, *given[2:], **named))


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_cannot_use_the_cache(models, kind):
    model, other = models[kind], made(kind, seed=3)
    cache = CACHES["host"](model)
    with evicting(model, cache):
        assert "turn of layer" in outcome(lambda: loop(other, PROMPT, cache))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"entries": 2.5}, "entries is 2.5; allowed: a whole number"),
        ({"entries": "8"}, "entries is '8'; allowed"),
        ({"entries": True}, "entries has True; allowed: whole numbers, 1 or more"),
        ({"entries": 0}, "entries has 0; allowed"),
        ({"entries": -3}, "entries has -3; allowed"),
        ({"entries": [8, 2.5]}, "entries has 2.5; allowed"),
        ({"entries": float("nan")}, "entries is nan; allowed"),
        ({"entries": None}, "entries is None; allowed"),
        ({"entries": {8: 1}}, "entries is {8: 1}; allowed"),
        ({"entries": np.array([8.0])}, "entries has np.float64(8.0); allowed"),
        ({"seeds": [-1]}, "seeds has -1; allowed: whole numbers, 0 or more"),
        ({"seeds": "01"}, "seeds is '01'; allowed"),
        ({"prompt_tokens": 0}, "prompt_tokens has 0; allowed"),
        ({"prompt_tokens": 1.0}, "prompt_tokens has 1.0; allowed"),
        ({"policy": "rkv"}, "policy is 'rkv'; allowed: what parse_policy gives"),
    ],
)
def test_arguments_out_of_their_range_are_one_line(models, given, words):
    given = {"policy": parse_policy("rkv"), "entries": AMPLE} | given
    with pytest.raises(UserError) as refused:
        EvictingCache(models["llama"], **given)
    assert str(refused.value).startswith(words)
