"""Memory of an evicting decode: budget and buffer of every sequence, freed when it ends."""

from __future__ import annotations

import pytest
from decoding import PROMPTS, decoded
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", seed=2)


def allocated(model, text, limits=40, entries=14, prompts=PROMPTS[1:4:2] * 2):
    """Decode 4 prompts longer than the budget; give the bytes of the pools after every step."""
    sizes = []
    decoded(model, text, entries, limits, prompts, on_step=lambda cache: sizes.append(cache.bytes_allocated))
    return sizes


BYTES_PER_ENTRY = 2 * 8 * 4
FULL = 2 * 2 * (14 + 7) * BYTES_PER_ENTRY  # one sequence: layers x KV heads x (budget + buffer)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["snapkv", "pyramid-rkv", "rkv+wave"])
def test_memory_is_budget_and_buffer_of_every_sequence_however_long_it_grows(llama, text):
    assert set(allocated(llama, f"{text}:buffer=7", limits=90)) == {4 * FULL}


def test_a_prompt_that_waits_for_its_first_compression_is_freed_by_it(llama):
    sizes = allocated(llama, "rkv:prompt=wait,buffer=7", prompts=[PROMPTS[3] * 3] * 4)
    assert sizes[0] > 4 * FULL
    assert set(sizes[1:]) == {4 * FULL}


@pytest.mark.parametrize("text", ["rkv+utility:delta=8", "random+wave+utility:delta=1,mu=0,beta=4"])
def test_unequal_head_budgets_take_no_more_memory_than_equal_ones(llama, text):
    sizes = allocated(llama, f"{text},buffer=7", limits=90)
    # A token brings one entry to every KV head: the last one before a compression may overfill the layer by
    # all of them but one. The replay counts these entries too.
    assert max(sizes) <= 4 * (FULL + 2 * (2 - 1) * BYTES_PER_ENTRY)


def test_memory_of_sequences_that_have_ended_is_freed(llama):
    sizes = allocated(llama, "rkv:buffer=7", limits=[10, 20, 30, 40])
    assert sorted(set(sizes), reverse=True) == [4 * FULL, 3 * FULL, 2 * FULL, FULL]
    assert sizes == sorted(sizes, reverse=True)


def test_the_full_cache_grows_with_the_chain(llama):
    sizes = allocated(llama, "fullkv", limits=40)
    held = 2 * 2 * (2 * (17 + 30) + 4 * 39) * BYTES_PER_ENTRY
    assert sizes[-1] >= held
