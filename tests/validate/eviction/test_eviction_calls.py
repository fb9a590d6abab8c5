"""Every way to call a model around its evicting cache gives the right text, or one line: no third outcome."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from spies import NAME, tiny_waves
from tiny_models import N_TOKEN_IDS, tiny_model
from transformers import DynamicCache

from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.device.cache import DeviceCache
from validate.eviction.kernels.ops import torch_ops

N_PROMPT, N_NEW, AMPLE, TIGHT = 50, 24, 4000, 24
SETTINGS = {"name": NAME, "waves": tiny_waves()}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": N_NEW}
KINDS = ["llama", "qwen3", "gemma3_text"]
CACHES = {
    "host": lambda model, policy="rkv:buffer=6", entries=AMPLE, **given: EvictingCache(
        model, parse_policy(policy), entries, **SETTINGS, **given
    ),
    "device": lambda model, policy="rkv:buffer=6", entries=AMPLE, **given: DeviceCache(
        model, parse_policy(policy), entries, ahead=2 * N_NEW, ops=torch_ops(), **SETTINGS, **given
    ),
}
# Every scorer and every allocator once, in one pass and in several.
CHUNKED = [
    *("streamingllm", "h2o", "tova", "snapkv", "snapkv-paper:window=4", "rkv", "keydiff", "knorm"),
    *("expected-attention:window=9", "vatp:sinks=3", "criticalkv:window=4", "append-only:window=4"),
    *("rkv+pyramid", "reasonalloc:delta=6", "rkv+cake:cake_window=6", "h2o+cake:cake_window=6"),
    *("rkv+wave-dynamic:layer_delta=5", "snapkv+adakv", "rkv+uniform+headkv", "rkv:prompt=wait"),
    *("rkv+squeeze", "lagkv:lag=4", "random", "rkv:trigger=per-step"),
]


def ids_of(seed, n=N_PROMPT, n_rows=1):
    return torch.randint(3, N_TOKEN_IDS, (n_rows, n), generator=torch.Generator().manual_seed(seed))


PROMPT, OTHER = ids_of(1), ids_of(2)


def made(kind, seed=2):
    return tiny_model(kind, seed=seed, head_dim=16)  # the least that a device's kernels take


@pytest.fixture(scope="module")
def models():
    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def stock():
    """Give what transformers writes after a prompt by models of the same weights; each text once."""
    models, known = {kind: made(kind) for kind in KINDS}, {}

    def written(kind, ids=PROMPT, **options):
        key = kind, tuple(ids.flatten().tolist()), str(sorted(options.items()))
        if key not in known:
            known[key] = generate(models[kind], ids, **options)
        return known[key]

    return written


def generate(model, ids, **options):
    given = {"attention_mask": torch.ones_like(ids)} | GREEDY | options
    return model.generate(input_ids=ids, **given)[:, ids.shape[1] :].tolist()


def loop(model, ids, cache, n_new=N_NEW, chunk=N_PROMPT, **given):
    """Decode by hand, the prompt in passes of ``chunk`` tokens."""
    written = []
    with torch.inference_mode():
        for part in ids.split(chunk, 1):
            logits = model(input_ids=part, past_key_values=cache, **given).logits
        while len(written) < n_new:
            written.append(logits[:, -1].argmax(-1))
            logits = model(input_ids=written[-1][:, None], past_key_values=cache, **given).logits
    return torch.stack(written, 1).tolist()


def outcome(call):
    """Give what a call wrote, or the one line in which it was refused."""
    try:
        return call()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return line


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


@pytest.mark.parametrize("where", CACHES)
def test_a_call_that_broke_off_leaves_no_half_text(models, stock, where):
    model = models["llama"]
    cache = CACHES[where](model)

    def fail(*_):
        raise MemoryError

    with evicting(model, cache):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            loop(model, PROMPT, cache)
        handle.remove()
        # The layers have all attended, so that the text goes on with what was read.
        handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
        cache.reset()
        with pytest.raises(MemoryError):
            loop(model, PROMPT, cache)
        handle.remove()
        assert "broke off" in outcome(lambda: loop(model, PROMPT, cache))
        cache.reset()
        assert loop(model, PROMPT, cache) == stock("llama")


@pytest.mark.parametrize("where", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_meant_for_the_cache_writes_what_transformers_writes(models, stock, kind, where):
    model, two = models[kind], ids_of(5, n_rows=2)
    with evicting(model, cache := CACHES[where](model)):
        assert generate(model, PROMPT, past_key_values=cache) == stock(kind)
    with evicting(model, cache := CACHES[where](model)):
        assert loop(model, PROMPT, cache) == stock(kind)
    with evicting(model, cache := CACHES[where](model)):
        found = generate(
            model, PROMPT, past_key_values=cache, do_sample=True, num_return_sequences=2, top_k=1
        )
        assert found == stock(kind) * 2
    mask = torch.ones_like(two)
    mask[1, :13] = 0
    with evicting(model, cache := CACHES[where](model)):
        found = generate(model, two, past_key_values=cache, attention_mask=mask)
    assert found == stock(kind, two, attention_mask=mask)
    # A batch keeps its rows apart, whatever stood in the padding.
    with evicting(model, cache := CACHES[where](model)):
        assert generate(model, two[1:, 13:], past_key_values=cache) == found[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_with_all_or_with_the_new_tokens(models, stock, kind):
    model, more = models[kind], ids_of(3, 5)
    first = torch.tensor(stock(kind))[:, :-1]
    whole = torch.cat([PROMPT, first, more], 1)
    expected = stock(kind, whole)

    def begun():
        cache = CACHES["host"](model)
        with evicting(model, cache):
            assert generate(model, PROMPT, past_key_values=cache) == stock(kind)
        return cache

    with evicting(model, cache := begun()):
        assert generate(model, whole, past_key_values=cache) == expected
    with evicting(model, cache := begun()):
        mask = torch.ones(1, whole.shape[1], dtype=torch.long)
        assert generate(model, more, past_key_values=cache, attention_mask=mask) == expected
    with evicting(model, cache := begun()):
        assert loop(model, more, cache) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_needs_a_reset(models, stock, kind):
    model = models[kind]
    cache = CACHES["host"](model)
    longer = torch.cat([OTHER, ids_of(4, N_NEW)], 1)
    with evicting(model, cache):
        generate(model, PROMPT, past_key_values=cache)
        assert "has read 73" in outcome(lambda: generate(model, PROMPT, past_key_values=cache))
        assert "has read 73" in outcome(lambda: generate(model, OTHER, past_key_values=cache))
        assert "differs" in outcome(lambda: generate(model, longer, past_key_values=cache))
        positions = torch.arange(N_PROMPT)[None]
        again = {"position_ids": positions, "past_key_values": cache}
        assert "position_ids end with" in outcome(lambda: model(OTHER, **again))
        again = {"attention_mask": torch.ones_like(OTHER), "past_key_values": cache}
        assert "attention mask" in outcome(lambda: model(OTHER, **again))
        cache.reset()
        assert generate(model, OTHER, past_key_values=cache) == stock(kind, OTHER)
        cache.reset()
        assert loop(model, PROMPT, cache) == stock(kind)


def test_a_call_that_was_refused_before_it_read_anything_leaves_no_trace(models, stock):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model)):
        with pytest.raises(ValueError, match="typo"):
            generate(model, OTHER[:, :7], past_key_values=cache, typo=1)
        assert generate(model, PROMPT, past_key_values=cache) == stock("llama")


@pytest.mark.parametrize("policy", CHUNKED)
def test_a_prompt_in_several_passes_is_one_prompt(models, policy):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
        expected = generate(model, PROMPT, past_key_values=cache)
        held = cache.held.tolist()
    for chunk in (1, 7, 16):
        with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
            assert generate(model, PROMPT, past_key_values=cache, prefill_chunk_size=chunk) == expected
            assert cache.held.tolist() == held
        with evicting(model, cache := CACHES["host"](model, policy, TIGHT, prompt_tokens=N_PROMPT)):
            assert loop(model, PROMPT, cache, chunk=chunk) == expected
        # Nobody says where the prompt ends: the first pass may not be the whole.
        with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
            assert "prompt_tokens=N" in outcome(
                lambda cache=cache, n=chunk: loop(model, PROMPT, cache, chunk=n)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_padded_prompts_in_several_passes_are_the_same_prompts(models, stock, kind):
    model, two = models[kind], ids_of(5, n_rows=2)
    mask = torch.ones_like(two)
    mask[1, :19] = 0  # more than a pass
    with evicting(model, cache := CACHES["host"](model, "rkv:buffer=6", TIGHT)):
        expected = generate(model, two, past_key_values=cache, attention_mask=mask)
    assert expected != stock(kind, two, attention_mask=mask)
    for chunk in (1, 7, 16):
        with evicting(model, cache := CACHES["host"](model, "rkv:buffer=6", TIGHT)):
            options = {"attention_mask": mask, "prefill_chunk_size": chunk}
            assert generate(model, two, past_key_values=cache, **options) == expected


def test_passes_that_do_not_end_with_the_prompt_are_refused(models, stock):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, prompt_tokens=45)):
        assert "ends behind" in outcome(lambda: loop(model, PROMPT, cache, chunk=7))
    with evicting(model, cache := CACHES["host"](model, prompt_tokens=45)):
        assert "prompt_tokens is 45" in outcome(lambda: generate(model, PROMPT, past_key_values=cache))
    with evicting(model, cache := CACHES["device"](model)):
        call = {"past_key_values": cache, "prefill_chunk_size": 7}
        assert "in one pass" in outcome(lambda: generate(model, PROMPT, **call))
    with evicting(model, cache := CACHES["host"](model, prompt_tokens=1)):
        assert loop(model, PROMPT[:, :1], cache) == stock("llama", PROMPT[:, :1])


def test_rows_are_left_out_after_their_prompts_only(models):
    model, two = models["llama"], ids_of(5, n_rows=2)
    with evicting(model, cache := CACHES["host"](model, entries=TIGHT, prompt_tokens=N_PROMPT)):
        model(input_ids=two[:, :7], past_key_values=cache)
        with pytest.raises(UserError, match="before their prompts are whole"):
            cache.batch_select_indices(torch.tensor([1]))


def test_rows_left_out_take_their_budgets_and_seeds_along(models):
    model, two, other = models["llama"], ids_of(5, n_rows=2), ids_of(6)
    policy = "random:buffer=6"
    with evicting(model, alone := CACHES["host"](model, policy, [TIGHT], seeds=[6])):
        expected, held = generate(model, other, past_key_values=alone), alone.held.tolist()
    with evicting(model, cache := CACHES["host"](model, policy, [TIGHT + 6, TIGHT], seeds=[5, 6])):
        generate(model, two, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.reset()
        assert generate(model, other, past_key_values=cache) == expected
    assert cache.held.tolist() == held


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


@pytest.mark.parametrize("entries", [np.int64(4000), [np.int32(4000)], (4000,), np.array([4000])])
def test_any_whole_number_is_an_argument(models, stock, entries):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, entries=entries)):
        assert generate(model, PROMPT, past_key_values=cache) == stock("llama")
