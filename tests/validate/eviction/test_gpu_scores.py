"""The kernels that score entries say what the simulator's scorers say, and so do their twins in torch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from gpu_device import DEVICE, ragged_pool

from simulator.engine.selection import select_slots
from simulator.kernels.duplicates import Redundancy
from simulator.kernels.windows import window_attention
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from simulator.policies.view import CacheView
from validate.eviction.kernels import twins, twins_scores

pytest.importorskip("triton")

from validate.eviction.kernels import importance as importance_kernels
from validate.eviction.kernels import redundancy as redundancy_kernels
from validate.eviction.kernels import scores as scores_kernels

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


@both
@pytest.mark.parametrize(
    ("group_size", "n_queries", "head_dim", "dtype"),
    [
        (1, 8, 16, FLOAT32),
        (2, 1, 64, FLOAT32),
        (3, 20, 16, FLOAT16),
        (4, 8, 128, FLOAT32),
        (4, 8, 128, FLOAT16),
        (4, 8, 128, BFLOAT16),
        (7, 5, 64, BFLOAT16),
        (8, 33, 32, FLOAT16),
        (8, 64, 16, FLOAT32),
    ],
)
def test_importance_is_the_simulators(code, group_size, n_queries, head_dim, dtype, rng):
    lengths = LENGTHS if head_dim == 16 else [0, 73, 9, 8, 150]
    pool = shuffled_pool(rng, lengths, head_dim, dtype)
    keys, _, _, starts, lengths = pool
    queries = asked(rng, keys, len(lengths), group_size, n_queries)
    scale, found = head_dim**-0.5, output(keys)
    longest = int(lengths.max())
    code.window_importance(queries, keys, starts, lengths, found, scale=scale, window=WINDOW, longest=longest)
    assert_matches(found, expected_importance(pool, queries, scale), rtol=1e-5)


@both
@types
def test_large_logits_do_not_overflow(code, dtype, rng):
    pool = shuffled_pool(rng, [40, 200], 64, dtype)
    keys, _, _, starts, lengths = pool
    queries = asked(rng, keys, 2, 4, WINDOW, size=25.0)
    found = output(keys)
    code.window_importance(queries, keys, starts, lengths, found, scale=0.25, window=WINDOW, longest=200)
    largest = (queries[1, 0] @ keys[starts[1] : starts[1] + 200].T).abs().max() * 0.25
    assert largest > 100
    # A logit of 100 is known to 1e-4 where tensor cores cut off what they add, and so is its weight.
    assert_matches(found, expected_importance(pool, queries, 0.25), rtol=3e-4, atol=1e-9)


@both
@pytest.mark.parametrize("window", [1, 5, 40])
def test_importance_leaves_out_any_window(code, window, rng):
    pool = shuffled_pool(rng, [41, 40, 130, 6, 1], 16, FLOAT32)
    keys, _, _, starts, lengths = pool
    queries, found = asked(rng, keys, 5, 2, 3), output(keys)
    code.window_importance(queries, keys, starts, lengths, found, scale=0.3, window=window, longest=130)
    assert_matches(found, expected_importance(pool, queries, 0.3, window), rtol=1e-5)


@both
@pytest.mark.parametrize(
    ("head_dim", "threshold", "dtype"),
    [
        (16, 0.5, FLOAT32),
        (16, 0.8, FLOAT16),
        (16, 0.5, BFLOAT16),
        (32, 0.7, FLOAT32),
        (64, 0.3, FLOAT16),
        (128, 0.5, FLOAT32),
        (128, 0.5, BFLOAT16),
    ],
)
def test_redundancy_is_the_simulators(code, head_dim, threshold, dtype, rng):
    lengths = LENGTHS if head_dim == 16 else [0, 73, 9, 150]
    pool = shuffled_pool(rng, lengths, head_dim, dtype)
    keys, _, _, starts, lengths = pool
    plant_duplicates(rng, keys, starts, lengths)
    found = output(keys)
    code.redundancy(keys, starts, lengths, found, threshold=threshold, longest=int(lengths.max()))
    expected = list(expected_redundancy(pool, threshold))
    assert_matches(found, expected, rtol=1e-6, atol=1e-9)
    # Duplicates count: without any, shares are others.
    without = list(expected_redundancy(pool, 1.1))
    assert max(np.abs(a - b).max() for (_, a), (_, b) in zip(expected, without, strict=True)) > 1e-5


@both
def test_every_key_but_opposites_is_a_duplicate_above_minus_one(code, rng):
    pool = shuffled_pool(rng, [5, 140, 2, 1], 16, FLOAT32)
    keys, _, _, starts, lengths = pool
    found = output(keys)
    code.redundancy(keys, starts, lengths, found, threshold=-1.0, longest=140)
    assert_matches(found, expected_redundancy(pool, -1.0), rtol=1e-6, atol=1e-9)


@both
@types
def test_a_cosine_at_the_threshold_is_no_duplicate(code, dtype, rng):
    keys, _, _, starts, lengths = pool = shuffled_pool(rng, [3], 16, dtype)
    # Both norms are powers of two: the cosine of the first two is 1/2 and no rounding moves it.
    keys[starts[0] : starts[0] + 3] = 0
    keys[starts[0], :4] = 1
    keys[starts[0] + 1, 0] = 1
    keys[starts[0] + 2, 5] = 1
    found = {}
    for threshold in (0.5, 0.4999):
        found[threshold] = output(keys)
        code.redundancy(keys, starts, lengths, found[threshold], threshold=threshold, longest=3)
        assert_matches(found[threshold], expected_redundancy(pool, threshold), rtol=1e-6)
    similar = torch.tensor([0.5, 0.5, 0.0], device=DEVICE) / 3
    slots = slice(int(starts[0]), int(starts[0]) + 3)
    torch.testing.assert_close(found[0.5][slots], similar.softmax(0), rtol=1e-6, atol=0)
    equal = torch.full((3,), 1 / 3, device=DEVICE)
    torch.testing.assert_close(found[0.4999][slots], equal, rtol=1e-6, atol=0)


def test_kernels_compare_wide_float32_keys_piece_by_piece(rng):
    # Two keys that differ in the last dimensions only: whoever leaves those out takes them for duplicates.
    keys, _, _, starts, lengths = pool = shuffled_pool(rng, [2, 70], 128, FLOAT32)
    first = int(starts[0])
    keys[first : first + 2] = 0
    keys[first : first + 2, 3] = 1
    keys[first, 127], keys[first + 1, 127] = 2, -2
    found = output(keys)
    Kernels.redundancy(keys, starts, lengths, found, threshold=0.5, longest=70)
    assert_matches(found, expected_redundancy(pool, 0.5), rtol=1e-6)


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
