"""kvpress's presses score as our scorers of the same papers do."""

from __future__ import annotations

import numpy as np
import pytest
from places import GOLDEN

from simulator.policies.contract import checked_scores
from simulator.policies.rope import read_rope
from simulator.policies.shipped import SCORERS
from simulator.policies.view import CacheView, LayerView

LARGEST = np.finfo(np.float32).max
N_TOKENS = 80


def vector(name):
    return np.load(GOLDEN / f"kvpress-{name}.npz")


def views_of(arrays, **changes):
    """Show both KV heads after the prompt, as the press saw them; changes may be per head."""
    queries = arrays["queries"].reshape(2, 2, N_TOKENS, 16)
    rope = read_rope({"rope_theta": arrays["rope_theta"].item()}, 16)
    return [
        CacheView(
            **{
                "keys": arrays["keys"][kv_head],
                "values": arrays["values"][kv_head],
                "positions": np.arange(N_TOKENS, dtype=np.int32),
                "queries": queries[kv_head],
                "scale": arrays["scale"].item(),
                "n_tokens": N_TOKENS,
                "prompt_tokens": N_TOKENS,
                "layer": 0,
                "kv_head": kv_head,
                "seed": 0,
                "rope": rope,
            }
            | {name: change(kv_head) if callable(change) else change for name, change in changes.items()}
        )
        for kv_head in range(2)
    ]


def scored(name, parameters, arrays, n_queries, **changes):
    """Give our scores (2, 80) after the last ``n_queries`` queries; protected entries are infinite."""
    views = views_of(arrays, **changes)
    queries = [view.queries[:, N_TOKENS - n_queries :] for view in views]
    views = views_of(arrays, **changes, queries=lambda kv_head: queries[kv_head])
    return np.stack(checked_scores(SCORERS[name](**parameters), LayerView.of(views)))


def agree(ours, theirs, **tolerance):
    """Compare where nothing is protected."""
    free = np.isfinite(ours)
    np.testing.assert_allclose(ours[free], theirs[free], **({"rtol": 1e-5} | tolerance))
    return free


def test_every_vector_is_compared():
    named = {path.stem.removeprefix("kvpress-") for path in GOLDEN.glob("kvpress-*.npz")}
    compared = {"knorm", "keydiff", "tova", "lagkv", "snapkv", "criticalkv"}
    compared |= {"expected-attention", "expected-attention-plain", "observed-attention"}
    assert {name for name in named if not name.startswith("adakv")} == compared


def test_knorm():
    arrays = vector("knorm")
    assert agree(scored("knorm", {}, arrays, 0), arrays["scores"], rtol=1e-6).all()


def test_keydiff():
    arrays = vector("keydiff")
    assert agree(scored("keydiff", {}, arrays, 0), arrays["scores"], rtol=0, atol=1e-6).all()


def test_tova_which_protects_the_newest_in_kvpress():
    arrays = vector("tova")
    ours = scored("tova", {"recent": 1}, arrays, 1)
    assert agree(ours, arrays["scores"])[:, :-1].all()
    np.testing.assert_array_equal(ours[0], ours[1])


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_snapkv(pool):
    arrays = vector("snapkv")
    window, kernel_size = arrays["window_size"].item(), arrays["kernel_size"].item()
    parameters = {"window": window, "kernel_size": kernel_size, "pool": pool}
    ours = scored("snapkv-paper", parameters, arrays, window)
    if pool == "avg":
        assert agree(ours, arrays["scores"])[:, :-window].all()
    else:
        assert not np.allclose(ours[:, :-window], arrays["scores"][:, :-window], rtol=0.1)


def test_lagkv_rank_by_rank():
    arrays = vector("lagkv")
    parameters = {"sinks": arrays["n_sink"].item(), "lag": arrays["lag_size"].item()}
    ours = scored("lagkv", parameters, arrays, 0)
    free = agree(ours, arrays["scores"], rtol=0)
    assert free[:, 4:].all()
    assert (ours[:, 4:52] < 1).all()
    by_keys = scored("lagkv", parameters | {"score_source": "keys"}, arrays, 0, values=None)
    assert (by_keys[:, 4:] != ours[:, 4:]).any()


@pytest.mark.parametrize("name", ["expected-attention", "expected-attention-plain"])
def test_expected_attention(name):
    arrays = vector(name)
    parameters = {
        "sinks": arrays["n_sink"].item(),
        "n_future": arrays["n_future_positions"].item(),
        "use_covariance": arrays["use_covariance"].item(),
        "use_values": arrays["use_vnorm"].item(),
        "epsilon": arrays["epsilon"].item(),
    }
    ours = scored("expected-attention", parameters, arrays, N_TOKENS)
    assert agree(ours, arrays["scores"])[:, 4:].all()


def test_criticalkv_with_the_projected_norms():
    arrays = vector("criticalkv")
    # A value of one channel whose size is that of the projected value, mean over the group.
    weights = arrays["output_weight"].reshape(64, 2, 2, 16)
    projected = np.einsum("xhgd,hjd->hgjx", weights, arrays["values"])
    norms = np.abs(projected).sum(axis=-1).mean(axis=1)[..., None]
    budget = int(N_TOKENS * (1 - arrays["compression_ratio"].item()))
    parameters = {
        "window": arrays["window_size"].item(),
        "kernel_size": arrays["kernel_size"].item(),
        "pool": "avg",
        "epsilon": arrays["epsilon"].item(),
        "first_stage_share": arrays["first_stage_ratio"].item(),
    }
    ours = scored("criticalkv", parameters, arrays, 8, values=lambda head: norms[head], budget=budget)
    first = arrays["scores"] == LARGEST
    assert (first.sum(axis=1) == budget // 2).all()
    for scores, chosen, theirs in zip(ours, first, arrays["scores"], strict=True):
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-scores, kind="stable")[: budget // 2])
        np.testing.assert_allclose(scores[~chosen], theirs[~chosen], rtol=1e-5)


def test_accumulated_attention_is_the_observed_attention_press():
    # That press divides the sum by how many queries saw the entry, and H2O does not.
    arrays = vector("observed-attention")
    n_observers = N_TOKENS - np.arange(N_TOKENS)
    for view, theirs in zip(views_of(arrays), arrays["scores"], strict=True):
        ours = SCORERS["h2o"]().observe(view)
        np.testing.assert_allclose(ours / n_observers, theirs, rtol=1e-5)
