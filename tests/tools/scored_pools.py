"""Pools whose entries kernels and their twins score, and what the simulator says of them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from gpu_device import ragged_pool

from simulator.kernels.duplicates import Redundancy
from simulator.kernels.windows import window_attention
from simulator.policies.view import CacheView

pytest.importorskip("triton")

from validate.eviction.kernels import importance as importance_kernels
from validate.eviction.kernels import redundancy as redundancy_kernels
from validate.eviction.kernels import scores as scores_kernels
from validate.eviction.kernels import twins_scores

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
WINDOW = 8
# None, one, around the window, around a block of 64 and of 128, and several blocks of either.
LENGTHS = [130, 0, 8, 1, 64, 9, 128, 67, 200, 3]
UNTOUCHED = 7.5


class Kernels:
    window_importance = staticmethod(importance_kernels.window_importance)
    redundancy = staticmethod(redundancy_kernels.redundancy)
    combine_scores = staticmethod(scores_kernels.combine_scores)


# Scores must not lean on segments standing in the order of their numbers.
shuffled_pool = partial(ragged_pool, shuffled=True)
both = pytest.mark.parametrize("code", [Kernels, twins_scores], ids=["kernels", "twins"])
types = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=["32", "16", "b16"])


def output(keys):
    return torch.full((len(keys),), UNTOUCHED, device=keys.device)


def asked(rng, keys, n_segments, group_size, n_queries, size=1.0):
    """Draw queries of the keys' type."""
    queries = size * rng.normal(size=(n_segments, group_size, n_queries, keys.shape[1]))
    return torch.from_numpy(queries).to(keys.device, keys.dtype)


def plant_duplicates(rng, keys, starts, lengths):
    """Make a third of each segment copies of few of its keys, some of them scaled, and one key zero."""
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        copies = rng.choice(length, size=length // 3, replace=False)
        factors = torch.from_numpy(2.0 ** rng.integers(-2, 3, size=len(copies))).to(keys)
        sources = torch.from_numpy(rng.integers(max(1, length // 10), size=len(copies)))
        keys[start + torch.from_numpy(copies)] = keys[start + sources] * factors[:, None]
        if length > 5:
            keys[start + length // 2] = 0


def segments(starts, lengths):
    """Give the slices of slots of all segments."""
    return [slice(int(s), int(s + n)) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def on_host(tensor):
    return tensor.detach().float().cpu().numpy()


def view_of(keys, positions, queries, slots, segment, scale):
    """Show a scorer one segment of the pool."""
    return CacheView(
        keys=on_host(keys[slots]),
        positions=positions[slots].cpu().numpy(),
        queries=on_host(queries[segment]),
        scale=scale,
        n_tokens=10**6,
        prompt_tokens=0,
        layer=0,
        kv_head=0,
        seed=0,
    )


def assert_matches(found, expected, rtol, atol=0.0):
    """Compare slots written, by slot, and see that no other was touched."""
    found, by_slot = on_host(found), np.full(len(found), UNTOUCHED, np.float32)
    for slots, numbers in expected:
        by_slot[slots] = numbers
    np.testing.assert_allclose(found, by_slot, rtol=rtol, atol=atol)
    untouched = by_slot == UNTOUCHED
    np.testing.assert_array_equal(found[untouched], by_slot[untouched])


def expected_importance(pool, queries, scale, window=WINDOW):
    keys, _, positions, starts, lengths = pool
    for segment, slots in enumerate(segments(starts, lengths)):
        n_candidates = slots.stop - slots.start - window
        if n_candidates > 0:
            view = view_of(keys, positions, queries, slots, segment, scale)
            attention = window_attention(view.keys[:n_candidates], view.queries, scale, "max_logits")
            yield slice(slots.start, slots.start + n_candidates), attention


def expected_redundancy(pool, threshold):
    keys, _, positions, starts, lengths = pool
    for slots in segments(starts, lengths):
        if slots.start < slots.stop:
            held = [on_host(keys[slots])], [positions[slots].cpu().numpy()]
            yield slots, Redundancy(threshold, spare_column0=False).shares(*held)[0]
