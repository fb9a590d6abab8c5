"""The shadow level equals the simulator; the forced level measures what an evicting model attends to."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from agreement import make_wave
from naive_decode import NAME as MASKED
from naive_decode import MaskedLayer
from tiny_models import N_TOKEN_IDS, tiny_model
from transformers import DynamicCache

import simulator.engine.layer
import validate.eviction.host.layer
import validate.levels.runs
from simulator.engine.compression import Compressor
from simulator.engine.selection import select_slots
from simulator.policies.language import parse_policy
from traces import write_trace
from traces.errors import UserError
from validate.levels.runs import Shadow, run_forced, run_shadow
from validate.models.load import load_model
from validate.problems.families import make_problem
from validate.problems.prompts import encode_prompt
from validate.record.decode import record_decode

POLICIES = [
    "streamingllm",
    "snapkv",
    "rkv",
    "pyramid-rkv",
    "rkv+wave",
    "rkv+utility:delta=12",
    "reasonalloc:delta=12",
    "random",
    "random-prompt",
]
ENTRIES, N_PROMPT, N_NEW = 20, 20, 60
PROMPT = torch.randint(3, N_TOKEN_IDS, (N_PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def policy_of(text, buffer=6):
    return parse_policy(text, buffer=buffer)


def recorded(model, folder, **settings):
    path = folder / "own.kvtrace"
    settings = {"max_new_tokens": N_NEW, "stop_ids": (), "model_name": "tiny"} | settings
    return record_decode(model, None, PROMPT, path, **settings)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    found = recorded(model, tmp_path_factory.mktemp("levels"))
    assert len(set(found.token_ids[N_PROMPT:])) > 10
    return found


@pytest.fixture(scope="module")
def waves(trace):
    return {trace.model: make_wave(trace, (3, 1))}


def differences(shadow):
    return [
        (mine and (mine.layer, mine.compression, mine.kv_head, mine.n_tokens), theirs and theirs.n_tokens)
        for mine, theirs in shadow.mismatches
    ]


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES)
def test_a_shadow_run_retains_who_the_simulator_retains(text, model, trace, waves):
    shadow = run_shadow(model, trace, policy_of(text), ENTRIES, seed=3, waves=waves)
    assert shadow.keys_equal
    assert len(shadow.found) == len(shadow.expected) >= 2 * 2 * 8  # layers, KV heads, compressions
    assert shadow.mismatches == []
    kept = {tuple(kept.positions) for kept in shadow.expected}
    assert len(kept) > 8  # it is no contest of empty or equal sets


@pytest.mark.parametrize(
    "text", ["rkv:trigger=every-n,interval=11,offset=3", "rkv:slot_order=score", "fullkv"]
)
def test_a_shadow_run_follows_triggers_and_slot_orders(text, model, trace, waves):
    shadow = run_shadow(model, trace, policy_of(text), ENTRIES, waves=waves)
    assert shadow.mismatches == []
    assert bool(shadow.expected) == (text != "fullkv")


def test_random_policies_draw_from_the_seed(model, trace, waves):
    first, second = (
        run_shadow(model, trace, policy_of("random"), ENTRIES, seed=seed, waves=waves) for seed in (0, 1)
    )
    assert Shadow(first.found, second.expected, True).mismatches


@pytest.mark.slow
@pytest.mark.parametrize("text", ["rkv", "reasonalloc"])
def test_a_shadow_run_of_the_reference_equals_the_simulator_in_bfloat16(text, tmp_path):
    loaded = load_model("reference", "bfloat16", "cpu")
    prompt = encode_prompt(loaded.tokenizer, make_problem("walk", 9, 0, size=4, length=60).prompt)
    path = tmp_path / "own.kvtrace"
    trace = record_decode(
        loaded.model, loaded.tokenizer, prompt, path, max_new_tokens=60, model_name=loaded.name
    )
    assert trace.shape.dtype == "bfloat16"
    shadow = run_shadow(loaded.model, trace, policy_of(text, buffer=8), 24)
    assert shadow.keys_equal
    assert len(shadow.expected) >= 8 * 5
    assert shadow.mismatches == []


class Worst(Compressor):
    """Keeps what scores lowest."""

    def survivors(self, scores, positions):
        return super().survivors([np.where(np.isinf(own), own, -own) for own in scores], positions)


class Late(Compressor):
    """Compresses a token later than it should."""

    def next_compression(self, n_tokens, n_entries):
        due = super().next_compression(n_tokens, n_entries)
        return None if due is None else due + 1


class Forgetful(Compressor):
    """Does not score by the newest query."""

    def score(self, held, queries, n_tokens):
        return super().score(held._replace(products=None), queries[:, :-1], n_tokens)


class Unscaled(Compressor):
    def score(self, *view):
        self.scale = 1.0
        return super().score(*view)


def earlier(scores, positions, n_kept, slot_order):
    """Choose one entry less well than the best: the best that was left out for the worst that stayed."""
    kept = select_slots(scores, positions, n_kept, slot_order)
    gone = np.setdiff1d(np.arange(len(scores)), kept)
    kept[np.argmin(scores[kept])] = gone[np.argmax(scores[gone])]
    return np.sort(kept)


@pytest.mark.slow
@pytest.mark.parametrize("side", [simulator.engine.layer, validate.eviction.host.layer])
@pytest.mark.parametrize("wrong", [Worst, Late, Forgetful, Unscaled])
def test_a_shadow_run_notices_a_mistake_on_either_side(wrong, side, model, trace, waves, monkeypatch):
    monkeypatch.setattr(side, "Compressor", wrong)
    assert run_shadow(model, trace, policy_of("snapkv"), ENTRIES, waves=waves).mismatches


@pytest.mark.parametrize("side", [simulator.engine.layer, validate.eviction.host.layer])
def test_a_shadow_run_notices_one_wrong_entry(side, model, trace, waves, monkeypatch):
    class Careless(Compressor):
        def survivors(self, scores, positions):
            slots = super().survivors(scores, positions)
            if self.layer == 1 and self.n_compressions == 9:
                slots[0] = earlier(scores[0], positions[0], len(slots[0]), "chronological")
            return slots

    monkeypatch.setattr(side, "Compressor", Careless)
    shadow = run_shadow(model, trace, policy_of("snapkv"), ENTRIES, waves=waves)
    first, _ = shadow.mismatches[0]
    assert (first.layer, first.compression, first.kv_head) == (1, 8, 0)


def test_a_compression_that_only_one_side_has_is_a_mismatch(model, trace, waves):
    shadow = run_shadow(model, trace, policy_of("rkv"), ENTRIES, waves=waves)
    kept, (last,) = shadow.found[:-1], shadow.found[-1:]
    assert Shadow(kept, shadow.expected, True).mismatches == [(None, last_of(shadow.expected))]
    assert Shadow(shadow.found, shadow.expected[:-1], True).mismatches == [(last, None)]
    later = replace(last, n_tokens=last.n_tokens + 1)
    assert Shadow([*kept, later], shadow.expected, True).mismatches == [(later, last_of(shadow.expected))]


def last_of(retained):
    return max(retained, key=lambda kept: (kept.layer, kept.compression, kept.kv_head))


def test_a_shadow_run_says_when_the_keys_are_others(trace, waves):
    shadow = run_shadow(tiny_model(seed=3), trace, policy_of("rkv"), ENTRIES, waves=waves)
    assert not shadow.keys_equal
    assert shadow.mismatches


class WeighedLayer(MaskedLayer):
    """A layer of the slow twin that weighs, in float64, what each new token finds retained."""

    def attend(self, query, key, value, scale):
        if self.queries is not None:
            group_size, n_tokens = len(query) // len(key), key.shape[1]
            shares, lost = [], []
            for head, own in enumerate(query[:, 0].double()):
                weights = (scale * key[head // group_size].double() @ own).softmax(0)
                retained = [*self.retained[head // group_size], n_tokens - 1]
                shares.append(float(weights[retained].sum()))
                lost.append(any(weights[j] > 0.5 for j in range(n_tokens) if j not in retained))
            self.mass = [*getattr(self, "mass", []), shares]
            self.lost = [*getattr(self, "lost", []), lost]
        return super().attend(query, key, value, scale)


@torch.inference_mode()
def masked_mass(model, trace, policy, entries):
    """Feed a trace's tokens to the slow twin; mass and losses (n_layers, n_query_heads, n_steps), choices."""
    layers = [WeighedLayer(layer, policy, entries, 0) for layer in range(trace.shape.n_layers)]
    before = model.config._attn_implementation
    model.set_attn_implementation(MASKED)
    for decoder_layer in model.model.layers:
        decoder_layer.self_attn.masked_twin = layers
    cache, ids = DynamicCache(config=model.config), torch.tensor([list(trace.token_ids)])
    model(input_ids=ids[:, :N_PROMPT], past_key_values=cache)
    chosen = []
    for step in range(N_PROMPT, trace.total_tokens):
        logits = model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits
        chosen.append(int(logits[0, -1].argmax()))
    model.set_attn_implementation(before)
    mass, lost = (
        np.array([getattr(layer, what) for layer in layers]).transpose(0, 2, 1) for what in ("mass", "lost")
    )
    return mass, lost, chosen


@pytest.mark.slow
@pytest.mark.parametrize("text", ["streamingllm", "rkv", "rkv+utility:delta=12"])
def test_forced_mass_is_what_a_masked_model_finds_retained(text, model, trace, waves):
    policy = policy_of(text)
    forced = run_forced(model, trace, policy, ENTRIES, waves=waves)
    expected, lost, chosen = masked_mass(model, trace, policy, ENTRIES)
    assert forced.forced.shape == forced.simulated.shape == (2, 4, N_NEW)
    np.testing.assert_allclose(forced.forced, expected, rtol=0, atol=1e-5)
    assert forced.forced.min() < 0.7
    np.testing.assert_array_equal(forced.forced_lost, lost)
    assert 0 < lost.mean() < 1
    np.testing.assert_array_equal(forced.simulated_lost[0], lost[0])  # nothing drifts in the first layer
    own = trace.token_ids[N_PROMPT + 1 :].tolist()
    assert forced.divergence.agrees.tolist() == [a == b for a, b in zip(chosen[:-1], own, strict=True)]
    assert 0 < forced.divergence.agrees.mean() < 1


def test_a_forced_run_may_be_fed_in_any_portions(model, trace, waves, monkeypatch):
    whole = run_forced(model, trace, policy_of("rkv"), ENTRIES, waves=waves)
    monkeypatch.setattr(validate.levels.runs, "_FORCED_TOKENS", 7)
    parts = run_forced(model, trace, policy_of("rkv"), ENTRIES, waves=waves)
    np.testing.assert_allclose(parts.forced, whole.forced, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(parts.divergence.agrees, whole.divergence.agrees)


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES)
def test_no_mass_drifts_in_the_first_layer(text, model, trace, waves):
    forced = run_forced(model, trace, policy_of(text), ENTRIES, seed=3, waves=waves)
    np.testing.assert_allclose(forced.forced[0], forced.simulated[0], rtol=0, atol=1e-5)
    assert np.abs(forced.forced[1] - forced.simulated[1]).max() > 0.01
    expected = (forced.forced.astype(np.float64) - forced.simulated).mean(1)
    np.testing.assert_allclose(forced.drift, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("text", ["rkv", "fullkv", "reasonalloc"])
def test_where_nothing_is_evicted_all_mass_stays_and_the_text_is_the_traces(text, model, trace, waves):
    forced = run_forced(model, trace, policy_of(text), 500, waves=waves)
    np.testing.assert_allclose(forced.forced, 1.0, rtol=0, atol=1e-6)
    assert (forced.simulated == 1).all()
    assert forced.divergence.agrees.shape == (N_NEW - 1,)
    assert forced.divergence.agrees.all()


def test_rows_hold_the_means(model, trace, waves):
    policy = policy_of("rkv")
    forced = run_forced(model, trace, policy, ENTRIES, waves=waves)
    assert forced.row() == pytest.approx(
        {
            **asdict(forced.replayed),
            "mass_mean": forced.simulated.mean(),
            "forced_mass": forced.forced.mean(),
            "drift": forced.forced.mean() - forced.simulated.mean(),
            "lost_lookup_rate": forced.simulated_lost.mean(),
            "forced_lost_lookup_rate": forced.forced_lost.mean(),
            **forced.divergence.columns(),
            "drift_layer_0": forced.forced[0].mean() - forced.simulated[0].mean(),
            "drift_layer_1": forced.forced[1].mean() - forced.simulated[1].mean(),
        },
        abs=1e-6,
    )
    shadow = run_shadow(model, trace, policy, ENTRIES, waves=waves)
    assert shadow.row() == {
        "decisions": len(shadow.found),
        "mismatches": 0,
        "keys_equal": True,
    }


def test_steps_hold_the_mean_of_every_layer_and_step(model, trace, waves):
    forced = run_forced(model, trace, policy_of("rkv"), ENTRIES, waves=waves)
    columns = forced.steps()
    for layer in range(2):
        for step in range(N_NEW):
            row = {name: values[layer * N_NEW + step] for name, values in columns.items()}
            assert row == pytest.approx(
                {
                    "layer": layer,
                    "step": step,
                    "simulated_mass": np.mean([float(x) for x in forced.simulated[layer, :, step]]),
                    "forced_mass": np.mean([float(x) for x in forced.forced[layer, :, step]]),
                    "simulated_lost_lookups": forced.simulated_lost[layer, :, step].sum() / 4,
                    "forced_lost_lookups": forced.forced_lost[layer, :, step].sum() / 4,
                    "kl": forced.divergence.kl[step],
                },
                abs=1e-6,
            )
    assert {len(values) for values in columns.values()} == {2 * N_NEW}


@pytest.mark.parametrize("run", [run_shadow, run_forced])
@pytest.mark.parametrize(
    "other",
    [
        {"num_hidden_layers": 3},
        {"dtype": "bfloat16"},
        {"n_kv_heads": 1},
        {"head_dim": 16},
        {"vocab_size": 40},
    ],
)
def test_a_trace_of_another_model_is_refused(run, other, trace, waves):
    with pytest.raises(UserError, match="allowed: the model the trace was recorded from"):
        run(tiny_model(**other), trace, policy_of("rkv"), ENTRIES, waves=waves)


@pytest.mark.parametrize("run", [run_shadow, run_forced])
def test_a_trace_without_a_decode_step_is_refused(run, model, tmp_path, rng):
    arrays = rng.normal(size=(2, 4, 9, 8)), rng.normal(size=(2, 2, 9, 8))
    trace = write_trace(tmp_path / "prompt.kvtrace", *arrays, prompt_tokens=9, dtype="float32")
    with pytest.raises(UserError, match="no decode step"):
        run(model, trace, policy_of("rkv"), ENTRIES)


def test_one_decode_step_has_a_row(model, tmp_path):
    trace = recorded(model, tmp_path, max_new_tokens=1)
    row = run_forced(model, trace, policy_of("streamingllm"), 12).row()
    assert row["agreement"] is None
    assert 0 < row["forced_mass"] < 1
