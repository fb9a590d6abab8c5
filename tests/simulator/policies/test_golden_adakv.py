"""The floor form of Ada-KV divides a layer as NVIDIA's kvpress does, and the same entries stay."""

from __future__ import annotations

import numpy as np
import pytest
from places import GOLDEN

from simulator.engine.selection import select_slots
from simulator.policies.heads.adakv import AdaKV
from simulator.policies.parts import HeadRequest


def kept_by(allocator, scores, total):
    """Mark who stays; bool, as ``scores``."""
    budgets, _ = allocator.allocate(HeadRequest(list(scores), total, 0))
    kept = np.zeros(scores.shape, bool)
    positions = np.arange(scores.shape[1], dtype=np.int32)
    for own, head, budget in zip(kept, scores, budgets.tolist(), strict=True):
        own[select_slots(head, positions, budget, "chronological")] = True
    return kept


@pytest.mark.parametrize("name", ["adakv", "adakv-snapkv"])
def test_floor_is_kvpress(name):
    vector = np.load(GOLDEN / f"kvpress-{name}.npz")
    scores, safe = vector["scores"], float(vector["alpha_safeguard"])
    totals = [2 * int(80 * (1 - ratio)) for ratio in vector["compression_ratio"]]
    assert totals == [80, 48]
    for total, kept in zip(totals, vector["kept"], strict=True):
        assert kept.sum() == total
        np.testing.assert_array_equal(kept_by(AdaKV(form="floor", uniform_share=safe), scores, total), kept)
        # The heads are of unlike lengths, so that uniform budgets would keep others.
        assert (kept_by(AdaKV(uniform_share=1.0), scores, total) != kept).any()


def test_the_safeguard_matters_in_the_vector():
    vector = np.load(GOLDEN / "kvpress-adakv.npz")
    unguarded = kept_by(AdaKV(form="floor", uniform_share=0.0), vector["scores"], 48)
    assert (unguarded != vector["kept"][1]).any()
