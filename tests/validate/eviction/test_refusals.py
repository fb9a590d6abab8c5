"""What cannot be decoded under a budget is refused in one line, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from decoding import PROMPTS, decoded, generated, new_cache
from tiny_models import tiny_model

from traces.errors import InfeasibleBudgetError, MissingDataError, UserError
from validate.eviction.cache import evicting
from validate.models.next_token import Sampling


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", seed=2)


def refused(words, error=UserError):
    """Expect an error of one line."""
    return pytest.raises(error, match=rf"\A[^\n]*{words}[^\n]*\Z")


@pytest.mark.parametrize(
    ("text", "entries", "words"),
    [
        ("rkv", [40, 8, 40, 40, 40], "allowed: at least 9"),
        ("streamingllm:sinks=4", 4, "allowed: at least 5"),
        ("random+pyramid:recent=0", [40, 40, 40, 40, 1], "leaves layer 1 no entry"),
    ],
)
def test_a_budget_that_cannot_hold_what_is_protected_is_refused(llama, text, entries, words):
    with refused(words, InfeasibleBudgetError):
        decoded(llama, text, entries)


def test_a_policy_without_its_wave_is_refused(llama):
    with refused("wave", MissingDataError):
        decoded(llama, "reasonalloc", name="another")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"entries": [20, 20]}, "budgets are given for 2 sequences; found: a batch of 5"),
        ({"seeds": [1, 2]}, "seeds are given for 2 sequences; found: a batch of 5"),
        ({"limits": [5, 5]}, "max_new_tokens is given 2 times"),
        ({"sampling": [Sampling()]}, "sampling is given 1 times"),
        ({"limits": 0}, "allowed: 1 or more"),
        ({"prompts": [[3], []], "limits": 5}, "allowed: 1 or more"),
        ({"prompts": [], "limits": 5}, "allowed: 1 or more"),
    ],
)
def test_settings_that_do_not_fit_the_prompts_are_refused(llama, settings, words):
    with refused(words):
        decoded(llama, "rkv", **settings)


def test_padding_after_a_prompt_is_refused(llama):
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    cache = new_cache(llama, "rkv")
    with torch.inference_mode(), evicting(llama, cache):
        with refused("allowed: left padding"):
            llama(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        llama(input_ids=ids, attention_mask=mask.flip(1), past_key_values=cache)
        later = torch.cat([mask.flip(1), mask], 1)
        with refused("allowed: left-padded prompts"):
            llama(input_ids=ids, attention_mask=later, past_key_values=cache)


def test_beams_and_steps_back_are_refused(llama):
    cache = new_cache(llama, "rkv")
    with evicting(llama, cache):
        with refused("cannot follow a beam search"):
            generated(llama, PROMPTS[:1], 5, num_beams=2, past_key_values=cache)
        with refused("cannot give tokens back"):
            cache.crop(-1)
        with refused("cannot be repeated 2 times"):
            cache.batch_repeat_interleave(2)


def test_a_sliding_window_in_force_is_refused():
    model = tiny_model("mistral", sliding_window=20)
    assert len(decoded(model, "rkv:buffer=7", 14, 4, PROMPTS[1:2])[0].token_ids) == 4  # up to 20 tokens
    with refused(
        "sliding window of 20 entries, in force at 21 tokens; only plain causal attention can evict"
    ):
        decoded(model, "rkv:buffer=7", 14, 5, PROMPTS[1:2])


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    with refused("0 of its 2 layers"):
        decoded(tiny_model("bloom", n_layer=2, n_head=4), "rkv", 14, 5)


def state(model):
    attributes = [sorted(vars(module)) for module in model.modules()]
    return model.config._attn_implementation, [module.training for module in model.modules()], attributes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    model.train()
    model.lm_head.eval()
    before = state(model)
    decoded(model, "rkv:buffer=7", limits=5)
    assert state(model) == before
    with evicting(model, new_cache(model, "rkv")):
        assert state(model) != before
    assert state(model) == before
    with refused("left padding"), torch.inference_mode(), evicting(model, new_cache(model, "rkv")) as cache:
        model(torch.tensor([[3, 0]]), attention_mask=torch.tensor([[1, 0]]), past_key_values=cache)
    assert state(model) == before


def test_a_model_evicts_into_one_cache_at_a_time(llama):
    first, second = new_cache(llama, "rkv"), new_cache(llama, "rkv")
    words = "attends through kvbudget_evict already"
    with evicting(llama, first), refused(words), evicting(llama, second):
        pass
