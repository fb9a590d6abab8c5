"""Decoding under a budget: the same text as a masked full cache, the memory that the replay predicts."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from decoding import (
    AMPLE,
    ENTRIES,
    LIMITS,
    N_NEW,
    PROMPTS,
    WAVES,
    decoded,
    generated,
    new_cache,
    padded,
    texts,
)
from naive_decode import decode_masked
from spies import LAYERED, NAME, POLICIES, SpyLayer, parsed, replayed, write_seen
from tiny_models import tiny_model

from simulator.policies.language import parse_policy
from validate.eviction import decode as decode_module
from validate.eviction.cache import EvictingCache, evicting
from validate.models.next_token import Sampling

KINDS = ["llama", "qwen2", "qwen3"]
NEVER_EVICTING = ["fullkv", "rkv", "reasonalloc", "snapkv+pyramid"]


@pytest.fixture(scope="module")
def models():
    """Give models and what stock transformers writes after each prompt."""
    found = {}
    for kind in KINDS:
        model = tiny_model(kind, seed=2)
        found[kind] = SimpleNamespace(model=model, written=generated(model, PROMPTS))
        assert all(len(set(row)) > 10 for row in found[kind].written)
    return found


@pytest.fixture
def llama(models):
    return models["llama"]


@torch.inference_mode()
def looped(model, cache, prompts, n_new, *, give_positions):
    """Decode greedily by hand, a token at a time."""
    ids, mask, positions = padded(prompts)
    written = []
    with evicting(model, cache):
        given = {"position_ids": positions, "attention_mask": mask} if give_positions else {}
        while len(written) < n_new:
            logits = model(input_ids=ids, past_key_values=cache, **given).logits
            written.append(logits[:, -1].argmax(-1))
            ids, positions = written[-1][:, None], positions[:, -1:] + 1
            given = {"position_ids": positions} if give_positions else {}
    return torch.stack(written, 1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("text", NEVER_EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_above_the_length_writes_what_transformers_writes(models, kind, text):
    model, written = models[kind].model, models[kind].written
    assert texts(decoded(model, text, AMPLE, N_NEW)) == written
    assert texts(decoded(model, text, AMPLE, N_NEW, PROMPTS[1:2])) == written[1:2]


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("text", NEVER_EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_writes_the_same_through_an_evicting_cache(models, kind, text, n_rows):
    model, cache = models[kind].model, new_cache(models[kind].model, text)
    with evicting(model, cache):
        written = generated(model, PROMPTS[:n_rows], past_key_values=cache)
    assert written == models[kind].written[:n_rows]
    assert len(cache.evicting_layers) == 2
    held = [len(prompt) + N_NEW - 1 for prompt in PROMPTS[:n_rows]]
    assert cache.held.tolist() == [2 * 2 * n for n in held]


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("text", NEVER_EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_by_hand_writes_the_same_through_an_evicting_cache(models, kind, text, n_rows):
    model, cache = models[kind].model, new_cache(models[kind].model, text)
    written = looped(model, cache, PROMPTS[:n_rows], 30, give_positions=n_rows > 1)
    assert written == [row[:30] for row in models[kind].written[:n_rows]]


def test_a_loop_by_hand_may_track_gradients(llama):
    # Parameters ask for them; nothing that is evicted has one.
    ids = torch.tensor(PROMPTS[:1])
    with evicting(llama.model, new_cache(llama.model, "rkv")) as cache:
        first = llama.model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax()
        second = llama.model(input_ids=first.view(1, 1), past_key_values=cache).logits[0, -1].argmax()
    assert [int(first), int(second)] == llama.written[0][:2]


def test_generate_goes_on_from_a_text_of_several_tokens(llama):
    more = [7, 8, 9, 10]
    whole = PROMPTS[1] + llama.written[1][:10] + more
    cache = new_cache(llama.model, "rkv")
    with evicting(llama.model, cache):
        generated(llama.model, PROMPTS[1:2], 10, past_key_values=cache)
        found = generated(llama.model, [whole], 20, past_key_values=cache)
    assert found == generated(llama.model, [whole], 20)


class Watch:
    """Notes, per row, what its layers retain whenever it is shown the cache."""

    def __init__(self):
        self.retained, self.layers = {}, None

    def __call__(self, cache):
        self.layers = cache.evicting_layers
        for at, row in enumerate(self.layers[0].rows.tolist()):
            kept = [layer.positions(at) for layer in self.layers]
            self.retained.setdefault(row, []).append(kept)


@pytest.fixture
def spying(monkeypatch):
    """Let decode use layers that note what they do."""
    monkeypatch.setattr(decode_module, "EvictingCache", partial(EvictingCache, layer_type=SpyLayer))


ORACLE_CASES = [("llama", text) for text in ["fullkv", *POLICIES, *LAYERED] if "slot_order" not in text]
ORACLE_CASES += [("qwen2", "reasonalloc:delta=16"), ("qwen3", "reasonalloc:delta=16"), ("qwen3", "snapkv")]


@pytest.mark.slow
@pytest.mark.usefixtures("spying")
@pytest.mark.parametrize(("kind", "text"), ORACLE_CASES)
def test_tokens_and_retained_entries_are_those_of_a_masked_full_cache(models, kind, text):
    model, watch = models[kind].model, Watch()
    policy = parsed(text, "buffer=7") if text != "fullkv" else parse_policy(text)
    found = decoded(model, policy, on_step=watch)
    for row, (prompt, entries, limit) in enumerate(zip(PROMPTS, ENTRIES, LIMITS, strict=True)):
        expected = decode_masked(model, prompt, policy, entries, limit, waves=WAVES, name=NAME, seed=row)
        assert watch.retained[row][:limit] == expected.retained
        assert found[row].token_ids == expected.token_ids
        assert (expected.token_ids == models[kind].written[row][:limit]) == (text == "fullkv")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["rkv+utility:delta=16,buffer=7", "random:buffer=7"])
def test_generate_and_a_loop_by_hand_evict_as_decode_does(llama, text):
    expected = texts(decoded(llama.model, text, limits=40))
    cache = new_cache(llama.model, text, ENTRIES)
    with evicting(llama.model, cache):
        assert generated(llama.model, PROMPTS, 40, past_key_values=cache) == expected
    cache = new_cache(llama.model, text, ENTRIES)
    assert looped(llama.model, cache, PROMPTS, 40, give_positions=True) == expected


def test_a_row_is_decoded_as_if_it_were_alone(llama):
    policy = "rkv+utility:delta=16,buffer=7"
    together = decoded(llama.model, policy)
    assert texts(together) != [row[:n] for row, n in zip(llama.written, LIMITS, strict=True)]
    for row in range(5):
        case = ENTRIES[row : row + 1], LIMITS[row : row + 1], PROMPTS[row : row + 1]
        assert decoded(llama.model, policy, *case, seeds=[row]) == together[row : row + 1]


def test_seeds_are_those_that_are_given(llama):
    default, same, other = (
        decoded(llama.model, "random:buffer=7", seeds=seeds) for seeds in (None, range(5), [5, 6, 7, 8, 9])
    )
    assert default == same
    assert default != other


def replay_of_what_was_seen(path, watch, row, completion, policy):
    """Replay the sequence that one row decoded; give the outcome, who was retained, and the trace."""
    # The token that ended a text, or met its limit, was not fed.
    n_steps = len(completion.token_ids) - (not completion.ended)
    trace = write_seen(path, watch.layers, row, len(PROMPTS[row]), n_steps)
    _, outcome, retained = replayed(trace, policy, ENTRIES[row], row, WAVES)
    assert len(outcome.held) == n_steps
    return outcome, retained, trace


@pytest.mark.usefixtures("spying")
def test_16_bit_models_evict_as_the_replay_of_what_they_saw(tmp_path):
    model, watch = tiny_model("llama", dtype="bfloat16"), Watch()
    policy = parse_policy("rkv+utility:delta=16,buffer=7")
    for row, completion in enumerate(decoded(model, policy, on_step=watch)):
        path = tmp_path / f"{row}.kvtrace"
        outcome, expected, trace = replay_of_what_was_seen(path, watch, row, completion, policy)
        for layer, retained in zip(watch.layers, expected, strict=True):
            assert [kept for kept in layer.retained[row] if kept[0] < trace.total_tokens] == retained
        assert completion.bytes_peak == outcome.held.max() * 2 * 8 * 2


def test_rows_end_with_a_stop_token_or_at_their_own_limit(llama):
    stops = {llama.written[1][12], llama.written[4][20]}
    found = decoded(llama.model, "fullkv", stop_ids=stops)
    for completion, row, limit in zip(found, llama.written, LIMITS, strict=True):
        end = min([row.index(stop) for stop in stops if stop in row] + [limit])
        assert completion.token_ids == row[:end]
        assert completion.ended == (end < limit)
    assert {completion.ended for completion in found} == {True, False}


def test_a_text_may_end_at_once(llama):
    (found,) = decoded(llama.model, "fullkv", 1, 5, PROMPTS[:1], stop_ids=llama.written[0][:1])
    assert (found.token_ids, found.ended, found.bytes_peak, found.bytes_mean) == ([], True, 0, 0)


@pytest.mark.slow
def test_sampling_depends_on_the_seed_and_not_on_the_batch(llama):
    policy, hot = "snapkv:buffer=7", partial(Sampling, do_sample=True, temperature=2.0, top_p=0.95)
    samplings = [hot(seed=seed) for seed in range(5)]
    together = decoded(llama.model, policy, sampling=samplings)
    assert decoded(llama.model, policy, sampling=samplings) == together
    others = decoded(llama.model, policy, sampling=[hot(seed=seed + 5) for seed in range(5)])
    for row in range(5):
        case = ENTRIES[row : row + 1], LIMITS[row : row + 1], PROMPTS[row : row + 1]
        assert decoded(llama.model, policy, *case, sampling=samplings[row]) == together[row : row + 1]
        assert others[row] != together[row]


@pytest.mark.slow
@pytest.mark.usefixtures("spying")
@pytest.mark.parametrize("text", ["fullkv", "snapkv", "random+utility:delta=8", *LAYERED])
def test_bytes_are_those_that_the_replay_predicts(llama, text, tmp_path, monkeypatch):
    # Those that have ended wait for half of the others, and are fed on meanwhile.
    monkeypatch.setattr(decode_module, "_DROP_AT", 0.5)
    policy, watch = parsed(text, "buffer=7") if text != "fullkv" else parse_policy(text), Watch()
    stops = {llama.written[1][12]}
    found = decoded(llama.model, policy, stop_ids=stops, on_step=watch)
    assert {completion.ended for completion in found} == {True, False}
    for row, completion in enumerate(found):
        path = tmp_path / f"{row}.kvtrace"
        outcome, _, trace = replay_of_what_was_seen(path, watch, row, completion, policy)
        held = outcome.held * trace.shape.bytes_per_entry
        assert completion.bytes_peak == held.max()
        assert completion.bytes_mean == held.sum() / len(held)
