"""Policies that look further than the last few queries decide alike in a replay and in a real cache."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from agreement import make_wave
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS
from traces.errors import InfeasibleBudgetError, UserError
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.decode import decode
from validate.levels.runs import run_forced, run_shadow
from validate.record.decode import record_decode

ENTRIES, N_PROMPT, N_NEW = 20, 24, 60
PROMPT = torch.randint(3, N_TOKEN_IDS, (N_PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
SMALL = {
    "snapkv-paper": "window=4",
    "criticalkv": "window=4",
    "append-only": "window=4",
    "gkv": "window=4",
    "vase": "window=4,sinks=2",
    "lagkv": "lag=4,sinks=2",
    "vatp": "sinks=3",
    "expected-attention": "window=9,n_future=32",
}
LAYERS = {
    "wave-dynamic": "layer_delta=10",
    "cake": "cake_window=6",
    "custom": "layer_shares=2/1",
}
HEADS = {"custom": "head_shares=1/2", "utility": "delta=12"}
POLICIES = [f"{name}:{SMALL.get(name, '')}".rstrip(":") for name in SCORERS if name != "fullkv"]
POLICIES += [f"rkv+{name}:{LAYERS.get(name, '')}".rstrip(":") for name in LAYER_ALLOCATORS]
POLICIES += [f"rkv+uniform+{name}:{HEADS.get(name, '')}".rstrip(":") for name in HEAD_ALLOCATORS]
POLICIES += [
    "h2o+wave-dynamic+utility:layer_delta=10,delta=12",
    "h2o:prompt=wait",
    "h2o:trigger=every-n,interval=11",
    "rkv:trigger=per-step",
    "rkv:trigger=segment,segment=5/9/17/20/33",
    "rkv+wave-dynamic:trigger=segment,segment=5/9/17/20/33,layer_delta=13",
    "tova+adakv",
    "vatp+cake+adakv:cake_window=6,sinks=3",
]


def policy_of(text):
    overrides = {} if "trigger=" in text else {"buffer": 6}
    return parse_policy(text, **overrides)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "own.kvtrace"
    settings = {"max_new_tokens": N_NEW, "stop_ids": (), "model_name": "tiny", "with_values": True}
    return record_decode(model, None, PROMPT, path, **settings)


@pytest.fixture(scope="module")
def waves(trace):
    return {trace.model: make_wave(trace, (3, 1))}


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES)
def test_a_shadow_run_retains_who_the_simulator_retains(text, model, trace, waves):
    shadow = run_shadow(model, trace, policy_of(text), ENTRIES, seed=3, waves=waves)
    assert shadow.keys_equal
    assert len(shadow.expected) >= 2 * 2 * 3  # layers, KV heads, compressions
    assert shadow.mismatches == []
    assert len({tuple(kept.positions) for kept in shadow.expected}) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["h2o", "rkv+wave-dynamic:layer_delta=10", "vatp+cake+adakv:cake_window=6,sinks=3"]
)
def test_no_mass_drifts_in_the_first_layer(text, model, trace, waves):
    # Not so for budgets that other layers' hidden states decide.
    forced = run_forced(model, trace, policy_of(text), ENTRIES, waves=waves)
    assert forced.forced.shape == forced.simulated.shape
    assert abs(forced.forced[1] - forced.simulated[1]).max() > 0.001
    if text == "h2o":
        assert abs(forced.forced[0] - forced.simulated[0]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "h2o",
        "tova",
        "expected-attention:window=9,n_future=32",
        "append-only:window=4",
        "rkv:prompt=wait",
        "h2o:prompt=wait",
        "rkv+wave-dynamic:layer_delta=10",
        "h2o+cake+utility:cake_window=6,delta=12",
        "rkv:trigger=segment,segment=5/9/17/20/33",
        "rkv+uniform+adakv:prompt=keep",
    ],
)
def test_sequences_of_a_batch_are_decoded_as_each_alone(text, model, waves):
    prompts = [PROMPT[:5], PROMPT[:19], PROMPT[3:], PROMPT[:14]]
    policy, entries = policy_of(text), [26, 31, 33, 27]
    settings = {"stop_ids": (), "waves": waves, "name": "tiny"}
    together = decode(model, prompts, policy, entries, [70, 31, 52, 11], seeds=[0, 1, 2, 3], **settings)
    for row, (prompt, own, limit) in enumerate(zip(prompts, entries, [70, 31, 52, 11], strict=True)):
        (alone,) = decode(model, [prompt], policy, own, limit, seeds=[row], **settings)
        assert alone == together[row]
    full = decode(model, prompts, parse_policy("fullkv"), entries, 70, stop_ids=())
    assert [done.token_ids for done in full] != [done.token_ids for done in together]


def test_memory_moves_between_layers_and_stays_in_all(model, waves):
    policy = policy_of("rkv+wave-dynamic:layer_delta=5,gamma=4")
    cache = EvictingCache(model, policy, ENTRIES, name="tiny", waves=waves)
    ids, totals, held = torch.tensor([PROMPT]), [], []
    with evicting(model, cache), torch.inference_mode():
        for _ in range(N_NEW):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            totals.append(tuple(layer.compressors[0].total for layer in cache.evicting_layers))
            held.append(int(cache.held[0]))
    assert len(set(totals)) >= 2
    assert {sum(total) for total in totals} == {2 * 2 * ENTRIES}
    # Budget and buffer, and for each layer one token more until a smaller budget is carried out.
    assert max(held[1:]) <= 2 * 2 * (ENTRIES + 6) + 2 * 2


def test_where_budgets_move_between_layers_tokens_come_up_to_the_next_decision(model, waves):
    policy, settings = policy_of("rkv+cake:cake_window=6"), {"name": "tiny", "waves": waves}
    for too_many in (0, 1):
        cache = EvictingCache(model, policy, ENTRIES, prompt_tokens=len(PROMPT), **settings)
        with evicting(model, cache), torch.inference_mode():
            model(input_ids=torch.tensor([PROMPT]), past_key_values=cache)
            most = cache.back_end.most_together
            assert 1 < most < 20
            said = f"takes {most} tokens at once here; found: {most + 1}"
            with pytest.raises(UserError, match=said) if too_many else nullcontext():
                model(input_ids=torch.arange(3, 3 + most + too_many)[None], past_key_values=cache)


@pytest.mark.parametrize("text", ["h2o", "h2o+cake:cake_window=6"])
def test_the_queries_of_a_prompt_are_let_go_of_with_it(text, model, waves):
    cache = EvictingCache(model, policy_of(text), ENTRIES, name="tiny", waves=waves)
    ids = torch.randint(3, N_TOKEN_IDS, (1, 700), generator=torch.Generator().manual_seed(4))
    with evicting(model, cache), torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    assert max(layer._queries.shape[2] for layer in cache.evicting_layers) <= 6


def test_a_trigger_that_waits_for_tokens_has_to_see_them(model):
    policy = policy_of("rkv:trigger=segment,segment=5/9")
    cache, ids = EvictingCache(model, policy, ENTRIES), torch.tensor([PROMPT])
    with evicting(model, cache), torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
        embedded = model.get_input_embeddings()(ids[:, :1])
        with pytest.raises(UserError, match="'segment' waits for certain tokens; found: a model fed without"):
            model(inputs_embeds=embedded, past_key_values=cache)
    cache = EvictingCache(model, policy_of("rkv"), ENTRIES)
    with evicting(model, cache), torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
        model(inputs_embeds=embedded, past_key_values=cache)
    assert cache.evicting_layers[0].n_tokens.tolist() == [N_PROMPT + 1]


def test_a_kept_prompt_has_to_fit_into_the_budget(model):
    policy = policy_of("rkv:prompt=keep")
    cache = EvictingCache(model, policy, N_PROMPT + 8)
    refused = pytest.raises(InfeasibleBudgetError, match=f"a prompt of {N_PROMPT} and 8 recent")
    with evicting(model, cache), torch.inference_mode(), refused:
        model(input_ids=torch.tensor([PROMPT]), past_key_values=cache)
    done = decode(model, [PROMPT], policy, N_PROMPT + 9, 40, stop_ids=())
    assert len(done[0].token_ids) == 40
