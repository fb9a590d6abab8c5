"""What the masked level sees, and how far its predictions are from the full cache's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.engine.layer import Retained
from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.levels.divergence import FullPredictions
from validate.levels.masked import masked_divergence, masks_of
from validate.levels.runs import run_forced, run_masked
from validate.record.decode import record_decode

PROMPT = torch.randint(3, N_TOKEN_IDS, (20,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("masked") / "own.kvtrace"
    return record_decode(model, None, PROMPT, path, max_new_tokens=50, stop_ids=(), model_name="tiny")


def replayed(trace, policy, entries=20):
    request = Request(trace, parse_policy(policy, buffer=6), entries, keep_retained=True)
    (outcome,) = Engine([request]).run()
    return outcome


def slow_masks(retained, n_kv_heads, layer, n_tokens):
    """Tell for each query by itself: what the latest compression before it kept, and all that came after."""
    seen = np.zeros((n_kv_heads, n_tokens, n_tokens), bool)
    for kv_head in range(n_kv_heads):
        for query in range(n_tokens):
            before = [
                kept
                for kept in retained
                if (kept.layer, kept.kv_head) == (layer, kv_head) and kept.n_tokens <= query
            ]
            latest = max(before, key=lambda kept: kept.compression, default=None)
            first = 0 if latest is None else latest.n_tokens
            for key in range(query + 1):
                seen[kv_head, query, key] = key >= first or key in latest.positions
    return seen


@pytest.mark.parametrize("policy", ["rkv", "rkv+utility:delta=6", "h2o", "streamingllm"])
def test_masks_are_what_was_retained_query_by_query(policy, trace):
    retained = replayed(trace, policy).retained
    masks = masks_of(retained[::-1], trace.shape.n_kv_heads)
    for layer in range(trace.shape.n_layers):
        expected = slow_masks(retained, trace.shape.n_kv_heads, layer, trace.total_tokens)
        assert not expected[:, -1].all()
        for first, n_new in ((0, trace.total_tokens), (0, 25), (25, 30), (31, 1)):
            found = masks.of(layer, first, n_new).numpy()
            np.testing.assert_array_equal(found, expected[:, first : first + n_new, : first + n_new])


@pytest.mark.parametrize("first", [20, 21, 45])
def test_where_all_is_retained_nothing_diverges(model, trace, first):
    """The pass runs through the masks from the first compression on, and finds what the full cache does."""
    heads = np.ndindex(trace.shape.n_layers, trace.shape.n_kv_heads)
    retained = [Retained(*head, 0, first, np.arange(first, dtype=np.int32)) for head in heads]
    passes = []
    with model.register_forward_pre_hook(
        lambda _, given, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    ):
        full = FullPredictions(model, trace)
        found = masked_divergence(model, trace, retained, full)
    assert passes == [20, 50, 70 - first]
    assert found.kl.shape == (trace.total_tokens - trace.prompt_tokens,)
    assert found.kl.max() < 1e-5
    assert not found.top_changed.any()
    assert abs(found.columns()["perplexity_ratio"] - 1) < 1e-5


def test_without_a_compression_the_model_is_not_asked(model, trace):
    full = FullPredictions(model, trace)
    found = masked_divergence(model, trace, [], full)
    assert found.kl.max() == 0
    assert found.agrees.all()  # a greedy text


def test_logits_that_are_no_numbers_are_refused(model, trace):
    full = FullPredictions(model, trace)
    logits = torch.zeros(50, full._probabilities.shape[1])
    logits[3, 5] = torch.nan
    with pytest.raises(UserError, match="hold a value that is no number"):
        full.compare(iter([logits]))


def test_divergence_is_that_of_the_definition(model, trace):
    """In float64, from the logits of a pass that sees one key less in one head."""
    everything = np.arange(30, dtype=np.int32)
    retained = [
        Retained(0, kv_head, 0, 30, everything if kv_head else everything[1:])
        for kv_head in range(trace.shape.n_kv_heads)
    ]
    full = FullPredictions(model, trace)
    found = masked_divergence(model, trace, retained, full)
    n_before = 30 - trace.prompt_tokens
    assert found.kl[:n_before].max() < 1e-6 < found.kl[n_before:].min()
    probabilities = full._probabilities.double()
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=probabilities.shape))
    cut = full.compare(iter([logits[:7].float(), logits[7:8].float(), logits[8:].float()]))
    expected = torch.special.xlogy(probabilities, probabilities / logits.softmax(-1)).sum(-1)
    np.testing.assert_allclose(cut.kl, expected.numpy(), rtol=1e-4)
    own = torch.from_numpy(np.array(trace.token_ids[trace.prompt_tokens + 1 :], np.int64))[:, None]
    change = logits.log_softmax(-1)[:-1].gather(1, own) - probabilities[:-1].log().gather(1, own)
    np.testing.assert_allclose(cut.log_likelihood_change, change[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cut.top_changed, (logits.argmax(-1) != probabilities.argmax(-1)).numpy())
    # A token that neither gives any chance, as padding of a vocabulary, changes nothing.
    impossible = torch.full_like(logits[:, :1], -torch.inf).float()
    full._probabilities = torch.cat([full._probabilities, torch.zeros_like(impossible)], 1)
    padded = full.compare(iter([torch.cat([logits.float(), impossible], 1)]))
    np.testing.assert_allclose(padded.kl, cut.kl, rtol=1e-5)
    # One that only the full cache gives a chance is infinitely missed.
    missed = torch.cat([logits.float(), impossible], 1)
    missed[4, 0] = -torch.inf
    assert np.flatnonzero(np.isinf(full.compare(iter([missed])).kl)).tolist() == [4]
    columns = cut.columns()
    assert columns["kl_worst"] == cut.kl.max()
    assert columns["perplexity_ratio"] == pytest.approx(float(torch.exp(-change.mean())), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streamingllm", "random", "random-prompt", "recency"])
def test_where_decisions_look_at_no_query_or_key_masked_is_forced(policy, model, trace):
    policy = parse_policy(policy, buffer=6)
    masked, forced = (run(model, trace, policy, 20, seed=4) for run in (run_masked, run_forced))
    np.testing.assert_allclose(masked.divergence.kl, forced.divergence.kl, rtol=1e-3, atol=1e-5)
    assert forced.divergence.kl.mean() > 0.01
    np.testing.assert_array_equal(masked.divergence.top_changed, forced.divergence.top_changed)
    assert masked.replayed == forced.replayed
    row = forced.row()
    same = [name for name in masked.row() if not name.startswith(("kl", "log", "perplexity"))]
    assert {name: masked.row()[name] for name in same} == {name: row[name] for name in same}
