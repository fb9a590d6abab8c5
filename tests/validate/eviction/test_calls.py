"""Every way to call a model around its evicting cache gives the right text, or one line: no third outcome."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calling import (
    CACHES,
    KINDS,
    N_NEW,
    N_PROMPT,
    OTHER,
    PROMPT,
    TIGHT,
    generate,
    ids_of,
    loop,
    outcome,
)
from tiers import sampled

from traces.errors import UserError
from validate.eviction.cache import evicting

# Every scorer and every allocator once, in one pass and in several.
CHUNKED = [
    *("streamingllm", "h2o", "tova", "snapkv", "snapkv-paper:window=4", "rkv", "keydiff", "knorm"),
    *("expected-attention:window=9", "vatp:sinks=3", "criticalkv:window=4", "append-only:window=4"),
    *("rkv+pyramid", "reasonalloc:delta=6", "rkv+cake:cake_window=6", "h2o+cake:cake_window=6"),
    *("rkv+wave-dynamic:layer_delta=5", "snapkv+adakv", "rkv+uniform+headkv", "rkv:prompt=wait"),
    *("rkv+squeeze", "lagkv:lag=4", "random", "rkv:trigger=per-step"),
]


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def chunked():
    """Give every policy with every size of a pass; every run tries one size of each."""
    for number, policy in enumerate(CHUNKED):
        yield from sampled([(policy, chunk) for chunk in (1, 7, 16)], 1, seed=number)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "chunk"), list(chunked()))
def test_a_prompt_in_several_passes_is_one_prompt(models, policy, chunk):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
        expected = generate(model, PROMPT, past_key_values=cache)
        held = cache.held.tolist()
    with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
        assert generate(model, PROMPT, past_key_values=cache, prefill_chunk_size=chunk) == expected
        assert cache.held.tolist() == held
    with evicting(model, cache := CACHES["host"](model, policy, TIGHT, prompt_tokens=N_PROMPT)):
        assert loop(model, PROMPT, cache, chunk=chunk) == expected
    # Nobody says where the prompt ends: the first pass may not be the whole.
    with evicting(model, cache := CACHES["host"](model, policy, TIGHT)):
        assert "prompt_tokens=N" in outcome(lambda: loop(model, PROMPT, cache, chunk=chunk))


@pytest.mark.slow
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


@pytest.mark.parametrize("entries", [np.int64(4000), [np.int32(4000)], (4000,), np.array([4000])])
def test_any_whole_number_is_an_argument(models, stock, entries):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, entries=entries)):
        assert generate(model, PROMPT, past_key_values=cache) == stock("llama")
