"""Decoding under a budget: the same text as a masked full cache, the memory that the replay predicts."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from naive_decode import decode_masked
from spies import LAYERED, NAME, POLICIES, SpyLayer, parsed, replayed, tiny_waves, write_seen
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from traces.errors import InfeasibleBudgetError, MissingDataError, UserError
from validate.eviction import decode as decode_module
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.decode import decode
from validate.models.next_token import Sampling

KINDS = ["llama", "qwen2", "qwen3"]
N_NEW = 60
AMPLE = 4000  # a pyramid's last layer gets a twentieth
NEVER_EVICTING = ["fullkv", "rkv", "reasonalloc", "snapkv+pyramid"]
ENTRIES, LIMITS = [14, 22, 12, 30, 18], [60, 40, 60, 20, 33]
PROMPTS = [
    torch.randint(3, N_TOKEN_IDS, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 17, 9, 30, 12)
]
WAVES = tiny_waves()


def padded(prompts):
    """Pad prompts on the left; give ids, mask and positions."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def generated(model, prompts, n_new=N_NEW, **options):
    """Generate greedily with transformers, without an end; the new tokens of each prompt."""
    ids, mask, _ = padded(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": n_new} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


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


def texts(completions):
    return [completion.token_ids for completion in completions]


def decoded(model, policy, entries=ENTRIES, limits=LIMITS, prompts=PROMPTS, **options):
    """Decode with a wave at hand and, unless told, without an end."""
    policy = parse_policy(policy)
    return decode(
        model, prompts, policy, entries, limits, **{"stop_ids": (), "name": NAME, "waves": WAVES} | options
    )


def new_cache(model, text, entries=AMPLE, **options):
    return EvictingCache(model, parse_policy(text), entries, **{"name": NAME, "waves": WAVES} | options)


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


@pytest.mark.parametrize("text", NEVER_EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_above_the_length_writes_what_transformers_writes(models, kind, text):
    model, written = models[kind].model, models[kind].written
    assert texts(decoded(model, text, AMPLE, N_NEW)) == written
    assert texts(decoded(model, text, AMPLE, N_NEW, PROMPTS[1:2])) == written[1:2]


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


def allocated(model, text, limits=40, entries=14, prompts=PROMPTS[1:4:2] * 2):
    """Decode 4 prompts longer than the budget; give the bytes of the pools after every step."""
    sizes = []
    decoded(model, text, entries, limits, prompts, on_step=lambda cache: sizes.append(cache.bytes_allocated))
    return sizes


BYTES_PER_ENTRY = 2 * 8 * 4
FULL = 2 * 2 * (14 + 7) * BYTES_PER_ENTRY  # one sequence: layers x KV heads x (budget + buffer)


@pytest.mark.parametrize("text", ["snapkv", "pyramid-rkv", "rkv+wave"])
def test_memory_is_budget_and_buffer_of_every_sequence_however_long_it_grows(llama, text):
    assert set(allocated(llama.model, f"{text}:buffer=7", limits=90)) == {4 * FULL}


def test_a_prompt_that_waits_for_its_first_compression_is_freed_by_it(llama):
    sizes = allocated(llama.model, "rkv:prompt=wait,buffer=7", prompts=[PROMPTS[3] * 3] * 4)
    assert sizes[0] > 4 * FULL
    assert set(sizes[1:]) == {4 * FULL}


@pytest.mark.parametrize("text", ["rkv+utility:delta=8", "random+wave+utility:delta=1,mu=0,beta=4"])
def test_unequal_head_budgets_take_no_more_memory_than_equal_ones(llama, text):
    sizes = allocated(llama.model, f"{text},buffer=7", limits=90)
    # A token brings one entry to every KV head: the last one before a compression may overfill the layer by
    # all of them but one. The replay counts these entries too.
    assert max(sizes) <= 4 * (FULL + 2 * (2 - 1) * BYTES_PER_ENTRY)


def test_memory_of_sequences_that_have_ended_is_freed(llama):
    sizes = allocated(llama.model, "rkv:buffer=7", limits=[10, 20, 30, 40])
    assert sorted(set(sizes), reverse=True) == [4 * FULL, 3 * FULL, 2 * FULL, FULL]
    assert sizes == sorted(sizes, reverse=True)


def test_the_full_cache_grows_with_the_chain(llama):
    sizes = allocated(llama.model, "fullkv", limits=40)
    held = 2 * 2 * (2 * (17 + 30) + 4 * 39) * BYTES_PER_ENTRY
    assert sizes[-1] >= held


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
        decoded(llama.model, text, entries)


def test_a_policy_without_its_wave_is_refused(llama):
    with refused("wave", MissingDataError):
        decoded(llama.model, "reasonalloc", name="another")


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
        decoded(llama.model, "rkv", **settings)


def test_padding_after_a_prompt_is_refused(llama):
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    cache = new_cache(llama.model, "rkv")
    with torch.inference_mode(), evicting(llama.model, cache):
        with refused("allowed: left padding"):
            llama.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        llama.model(input_ids=ids, attention_mask=mask.flip(1), past_key_values=cache)
        later = torch.cat([mask.flip(1), mask], 1)
        with refused("allowed: left-padded prompts"):
            llama.model(input_ids=ids, attention_mask=later, past_key_values=cache)


def test_beams_and_steps_back_are_refused(llama):
    cache = new_cache(llama.model, "rkv")
    with evicting(llama.model, cache):
        with refused("cannot follow a beam search"):
            generated(llama.model, PROMPTS[:1], 5, num_beams=2, past_key_values=cache)
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
    first, second = new_cache(llama.model, "rkv"), new_cache(llama.model, "rkv")
    words = "attends through kvbudget_evict already"
    with evicting(llama.model, first), refused(words, RuntimeError), evicting(llama.model, second):
        pass
