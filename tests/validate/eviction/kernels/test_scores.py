"""The kernels that score entries say what the simulator's scorers say, and so do their twins in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from scored_pools import (
    FLOAT32,
    LENGTHS,
    UNTOUCHED,
    WINDOW,
    Kernels,
    asked,
    assert_matches,
    both,
    expected_importance,
    expected_redundancy,
    on_host,
    output,
    plant_duplicates,
    segments,
    shuffled_pool,
    types,
    view_of,
)

from simulator.engine.selection import select_slots
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from validate.eviction.kernels import redundancy as redundancy_kernels
from validate.eviction.kernels import twins, twins_scores


@pytest.mark.slow
@types
def test_a_loose_bound_on_lengths_changes_nothing_but_rounding(dtype, rng):
    pool = shuffled_pool(rng, [150, 30, 0], 16, dtype)
    keys, _, _, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    queries, expected = asked(rng, keys, 3, 2, WINDOW), list(expected_redundancy(pool, 0.5))
    attended = list(expected_importance(pool, queries, 0.25))
    # So many entries that parts of a segment hold several blocks.
    for longest in (151, 8500):
        found = output(keys)
        Kernels.redundancy(keys, starts, lengths, found, threshold=0.5, longest=longest)
        assert_matches(found, expected, rtol=1e-6, atol=1e-9)
        found = output(keys)
        sizes = {"scale": 0.25, "window": WINDOW, "longest": longest}
        Kernels.window_importance(queries, keys, starts, lengths, found, **sizes)
        assert_matches(found, attended, rtol=1e-5)


@pytest.mark.slow
def test_kernels_score_a_segment_of_many_blocks(rng, monkeypatch):
    # More blocks, and more parts of 64, than are summed at once.
    monkeypatch.setattr(redundancy_kernels, "_BLOCK", 32)
    pool = shuffled_pool(rng, [12, 1100], 16, FLOAT32)
    keys, _, _, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    queries, found = asked(rng, keys, 2, 2, 3), output(keys)
    # The largest logit of one query comes with its last candidate.
    keys[starts[1] + 1091] = 8 * queries[1, 0, 0]
    Kernels.redundancy(keys, starts, lengths, found, threshold=0.6, longest=1100)
    assert_matches(found, expected_redundancy(pool, 0.6), rtol=1e-6)
    found = output(keys)
    Kernels.window_importance(queries, keys, starts, lengths, found, scale=0.25, window=WINDOW, longest=1100)
    assert_matches(found, expected_importance(pool, queries, 0.25), rtol=1e-5)


def test_twins_do_not_depend_on_the_size_of_their_blocks(rng, monkeypatch):
    pool = shuffled_pool(rng, [60, 0, 31, 9, 40], 16, FLOAT32)
    keys, _, positions, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    queries = asked(rng, keys, 5, 2, WINDOW)
    monkeypatch.setattr(twins, "_BLOCK_ELEMENTS", 1500)
    for segment, (slots, scores) in enumerate(scored(twins_scores, pool, queries, RKV(window=WINDOW))):
        view = view_of(keys, positions, queries, slots, segment, 0.25)
        expected = RKV(window=WINDOW).score(view)[:-WINDOW]
        np.testing.assert_allclose(scores[:-WINDOW], expected, rtol=1e-5, atol=1e-7)


def scored(code, pool, queries, scorer):
    """Score a pool, 0.25 the scale; give each segment's slots and scores."""
    keys, _, _, starts, lengths = pool
    held, longest = (starts, lengths), int(lengths.max())
    attended, scores, repeated = output(keys), output(keys), None
    sizes = {"window": scorer.window, "longest": longest}
    code.window_importance(queries, keys, *held, attended, scale=0.25, **sizes)
    alpha = 1.0
    if isinstance(scorer, RKV):
        repeated, alpha = output(keys), scorer.alpha
        code.redundancy(keys, *held, repeated, threshold=scorer.similarity_threshold, longest=longest)
    sizes["kernel_size"] = scorer.kernel_size
    code.combine_scores(attended, repeated, *held, scores, alpha=alpha, **sizes)
    return [(slots, on_host(scores[slots])) for slots in segments(starts, lengths)]


scorers = pytest.mark.parametrize(
    "scorer",
    [
        RKV(window=WINDOW),
        RKV(window=3, kernel_size=1, alpha=0.5, similarity_threshold=0.8),
        SnapKV(window=WINDOW, kernel_size=5),
    ],
    ids=["rkv", "rkv-half", "snapkv"],
)


@pytest.mark.slow
@both
@scorers
def test_the_same_positions_survive(code, scorer, rng):
    pool = shuffled_pool(rng, LENGTHS, 16, FLOAT32)
    keys, _, positions, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    # Exact copies would tie, and rounding decide between them.
    keys += 0.1 * torch.from_numpy(rng.normal(size=keys.shape)).to(keys)
    queries = asked(rng, keys, len(LENGTHS), 4, scorer.window)
    n_compared = 0
    for segment, (slots, scores) in enumerate(scored(code, pool, queries, scorer)):
        view = view_of(keys, positions, queries, slots, segment, 0.25)
        n_candidates = max(0, len(scores) - scorer.window)
        expected = scorer.score(view)
        expected[n_candidates:] = np.inf
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)
        for n_kept in range(len(scores) - n_candidates, len(scores), 5):
            kept = select_slots(scores, view.positions, n_kept, "chronological")
            same = select_slots(expected, view.positions, n_kept, "chronological")
            np.testing.assert_array_equal(kept, same)
            n_compared += n_kept > scorer.window
    assert n_compared > 50


@both
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 41])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.1, 1.0])
def test_scores_combine_pooled_importance_and_redundancy(code, kernel_size, alpha, rng):
    lengths = [0, 5, 8, 9, 30, 700]
    keys, _, _, starts, lengths = shuffled_pool(rng, lengths, 16, FLOAT32)
    attended, repeated, found = output(keys), output(keys), output(keys)
    expected = []
    for slots in segments(starts, lengths):
        n = slots.stop - slots.start
        n_candidates = max(0, n - WINDOW)
        numbers, shares = rng.random((2, n), np.float32)
        # What the window's slots and those of others hold is larger than any candidate's, and must not leak.
        attended[slots] = torch.from_numpy(numbers)
        attended[slots.start + n_candidates : slots.stop] = 50
        repeated[slots] = torch.from_numpy(shares)
        half = kernel_size // 2
        scores = np.full(n, np.inf, np.float32)
        for i in range(n_candidates):
            scores[i] = numbers[max(0, i - half) : min(n_candidates, i + half + 1)].max()
        if alpha is not None:
            scores[:n_candidates] *= np.float32(alpha)
            scores[:n_candidates] -= np.float32(1 - alpha) * shares[:n_candidates]
        expected.append((slots, scores))
    held = starts, lengths
    given = repeated if alpha is not None else None
    sizes = {"kernel_size": kernel_size, "window": WINDOW, "longest": 700}
    code.combine_scores(attended, given, *held, found, alpha=alpha or 0.0, **sizes)
    assert_matches(found, expected, rtol=0)


@pytest.mark.slow
@types
def test_kernels_repeat_bit_for_bit_alone_and_in_company(dtype, rng):
    pool = shuffled_pool(rng, [200, 70, 133], 16, dtype)
    keys, _, _, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    queries = asked(rng, keys, 3, 3, WINDOW)

    def run(some):
        attended, repeated = output(keys), output(keys)
        held, longest = (starts[some], lengths[some]), 200
        sizes = {"scale": 0.25, "window": WINDOW, "longest": longest}
        Kernels.window_importance(queries[some], keys, *held, attended, **sizes)
        Kernels.redundancy(keys, *held, repeated, threshold=0.5, longest=longest)
        return on_host(attended), on_host(repeated)

    together = run(slice(None))
    for _ in range(1 if DEVICE == "cpu" else 20):
        np.testing.assert_array_equal(run(slice(None)), together)
    slots = segments(starts, lengths)[2]
    for alone, all_numbers in zip(run(slice(2, 3)), together, strict=True):
        np.testing.assert_array_equal(alone[slots], all_numbers[slots])


@both
@pytest.mark.parametrize(("lengths", "longest"), [([], 0), ([], 9), ([0, 0], 0), ([0, 0], 5)])
def test_nothing_held_writes_nothing(code, lengths, longest, rng):
    keys, _, _, starts, lengths = shuffled_pool(rng, lengths, 16, FLOAT32)
    found = output(keys)
    queries = asked(rng, keys, len(starts), 2, WINDOW)
    sizes = {"window": 2, "longest": longest}
    code.window_importance(queries, keys, starts, lengths, found, scale=1.0, **sizes)
    code.redundancy(keys, starts, lengths, found, threshold=0.5, longest=longest)
    sizes["kernel_size"] = 3
    code.combine_scores(output(keys), None, starts, lengths, found, alpha=1.0, **sizes)
    assert (found == UNTOUCHED).all()


@both
def test_refusals_say_what_is_allowed(code, rng):
    keys, _, _, starts, lengths = shuffled_pool(rng, [20], 16, FLOAT32)
    sizes = {"window": WINDOW, "longest": 20}
    for kernel_size in (0, 4, -3):
        with pytest.raises(ValueError, match=f"kernel_size is {kernel_size}; allowed: an odd number"):
            code.combine_scores(
                output(keys), None, starts, lengths, output(keys), alpha=1.0, kernel_size=kernel_size, **sizes
            )
    queries = asked(rng, keys, 1, 2, WINDOW).half()
    with pytest.raises(ValueError, match=r"torch.float16; allowed: torch.float32, as keys"):
        code.window_importance(queries, keys, starts, lengths, output(keys), scale=1.0, **sizes)


def test_kernels_refuse_widths_they_have_no_tiles_for(rng):
    keys, _, _, starts, lengths = shuffled_pool(rng, [20], 24, FLOAT32)
    queries = asked(rng, keys, 1, 2, WINDOW)
    with pytest.raises(ValueError, match="head_dim is 24; allowed: 16, 32, 64, 128, 256"):
        Kernels.redundancy(keys, starts, lengths, output(keys), threshold=0.5, longest=20)
    sizes = {"scale": 1.0, "window": WINDOW, "longest": 20}
    with pytest.raises(ValueError, match="head_dim is 24; allowed"):
        Kernels.window_importance(queries, keys, starts, lengths, output(keys), **sizes)
