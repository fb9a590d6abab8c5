"""A cache goes on with its own text, model and batch only, however they are brought."""

from __future__ import annotations

import pytest
import torch
from calling import CACHES, GREEDY, N_PROMPT, OTHER, PROMPT, TIGHT, generate, ids_of, loop, made, outcome
from tiny_models import tiny_model

from traces.errors import UserError
from validate.eviction.cache import EvictingCache, evicting


def embedded(model, ids, cache):
    """Write after embeddings of ids."""
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    return model.generate(**given, **GREEDY, past_key_values=cache).tolist()


@pytest.mark.parametrize("where", CACHES)
@pytest.mark.parametrize("n_more", [1, 10])
def test_another_text_that_is_longer_is_refused(models, stock, where, n_more):
    model = models["llama"]
    with evicting(model, cache := CACHES[where](model)):
        assert generate(model, PROMPT, past_key_values=cache) == stock("llama")
        longer = ids_of(9, cache.get_seq_length() + n_more)
        assert "another text" in outcome(lambda: generate(model, longer, past_key_values=cache))


def test_a_text_of_embeddings_is_not_taken_for_the_one_that_was_read(models, stock):
    model = models["llama"]
    for first, second in ((embedded, generate), (embedded, embedded), (generate, embedded)):
        with evicting(model, cache := CACHES["host"](model)):
            call = {"past_key_values": cache} if first is generate else {"cache": cache}
            assert first(model, PROMPT, **call) == stock("llama")
            longer = ids_of(9, cache.get_seq_length() + 10)
            call = {"past_key_values": cache} if second is generate else {"cache": cache}
            told = outcome(lambda second=second, longer=longer, call=call: second(model, longer, **call))
            assert "cannot be held against what the cache has read" in told


def test_a_start_that_was_read_by_hand_is_not_taken_for_the_prompt(models):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, entries=TIGHT)):
        model(input_ids=PROMPT[:, :16], past_key_values=cache)
        assert "prompt_tokens=N" in outcome(lambda: generate(model, PROMPT, past_key_values=cache))
    with evicting(model, cache := CACHES["host"](model, entries=TIGHT)):
        expected = generate(model, PROMPT, past_key_values=cache)
    with evicting(model, cache := CACHES["host"](model, entries=TIGHT, prompt_tokens=N_PROMPT)):
        model(input_ids=PROMPT[:, :16], past_key_values=cache)
        assert generate(model, PROMPT, past_key_values=cache) == expected


def test_a_text_is_not_continued_by_another_model(models):
    model, twin = models["llama"], made("llama", seed=5)
    with evicting(model, cache := CACHES["host"](model)):
        loop(model, PROMPT, cache, 2)
    with pytest.raises(UserError, match="another model has read"), evicting(twin, cache):
        pass
    cache.reset()
    with evicting(twin, cache):
        loop(twin, PROMPT, cache, 2)
    cache.reset()
    other = tiny_model(
        "llama", seed=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    with pytest.raises(UserError, match="was made for a model of"), evicting(other, cache):
        pass


def test_the_model_below_its_head_is_watched_too(models):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model)):
        model.model(input_ids=PROMPT, past_key_values=cache)
        call = {"input_ids": OTHER[:, :1], "position_ids": torch.tensor([[3]])}
        assert "positions that go on" in outcome(lambda: model.model(past_key_values=cache, **call))
        assert "none in place" in outcome(lambda: model.model(**call))


def test_positions_that_start_again_are_refused(models):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model)):
        loop(model, PROMPT, cache, 1)
        call = {"input_ids": OTHER[:, :1], "position_ids": torch.tensor([[0]])}
        assert "positions that go on" in outcome(lambda: model(past_key_values=cache, **call))


@pytest.mark.parametrize(("n_first", "n_then"), [(1, 2), (2, 1)])
def test_a_batch_of_another_size_does_not_go_on(models, n_first, n_then):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model)):
        loop(model, ids_of(5, n_rows=n_first), cache, 2)
        call = {"input_ids": ids_of(6, 1, n_then), "past_key_values": cache}
        assert f"a batch of {n_then} follows" in outcome(lambda: model(**call))


@pytest.mark.parametrize("gave", [True, False])
def test_padded_prompts_keep_their_way_of_counting(models, gave):
    model, two = models["llama"], ids_of(5, n_rows=2)
    mask = torch.ones_like(two)
    mask[1, :19] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with evicting(model, cache := CACHES["host"](model)):
        given = {"position_ids": positions} if gave else {}
        model(input_ids=two, attention_mask=mask, past_key_values=cache, **given)
        later = {} if gave else {"position_ids": positions[:, -1:] + 1}
        call = {"input_ids": two[:, :1], "past_key_values": cache, **later}
        assert "in all passes or none" in outcome(lambda: model(**call))


@pytest.mark.parametrize("ahead", [2.5, "8", None, -1, True, 2**70])
def test_tokens_ahead_out_of_their_range_are_one_line(models, ahead):
    model = models["llama"]
    with pytest.raises(UserError, match=r"ahead has .*; allowed: whole numbers, 0 or more"):
        type(CACHES["device"](model))(model, CACHES["host"](model).policy, 30, ahead=ahead)


@pytest.mark.parametrize("entries", [[], {30, 31}, 2**62, torch.tensor(2.5)])
def test_entries_out_of_their_range_are_one_line(models, entries):
    with pytest.raises(UserError, match=r"entries (is|has) .*; allowed"):
        EvictingCache(models["llama"], CACHES["host"](models["llama"]).policy, entries)


def test_a_tensor_of_entries_is_a_number(models, stock):
    model = models["llama"]
    with evicting(model, cache := CACHES["host"](model, entries=torch.tensor(4000))):
        assert generate(model, PROMPT, past_key_values=cache) == stock("llama")
        with pytest.raises(UserError, match=r"prompt_tokens has 2\.5"):
            cache.reset(2.5)
        with pytest.raises(UserError, match="entered twice"), evicting(model, cache):
            pass
        with pytest.raises(UserError, match="already"), evicting(model, CACHES["host"](model)):
            pass
    with pytest.raises(UserError, match="cache is None; allowed"), evicting(model, None):
        pass
