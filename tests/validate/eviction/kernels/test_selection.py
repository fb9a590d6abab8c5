"""Selection, demand and moving of survivors: kernels and twins against the simulator and plain NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cases import MODERATE
from gpu_device import DEVICE, ragged_pool
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simulator.engine.selection import select_slots
from simulator.policies.heads import utility
from validate.eviction.kernels import compaction, selection, twins

SELECT = {"kernel": selection.select, "twin": twins.select}
DEMAND = {"kernel": selection.demand, "twin": twins.demand}
COMPACT = {"kernel": compaction.compact, "twin": twins.compact}
FILL = {"kernel": compaction.fill, "twin": twins.fill}
LENGTHS = np.array([0, 127, 129, 700, 1, 300])
HEAD_DIM = 16


def draw_scores(rng, kind, n):
    if kind == "gaussian":
        return rng.normal(size=n)
    if kind == "negative":
        return -rng.gamma(1.0, size=n)
    if kind == "equal":
        return np.full(n, -0.25)
    if kind == "few":
        return rng.integers(-2, 3, n) / 2
    if kind == "zeros":
        return rng.choice([0.0, -0.0], n)
    if kind == "extreme":
        limits = np.finfo(np.float32)
        smallest = [limits.tiny, limits.smallest_subnormal, 3 * limits.smallest_subnormal, 0.0]
        sizes = np.array([*smallest, 1.0, limits.max, np.inf], np.float32)
        return rng.choice([*sizes, *-sizes], n)
    scores = rng.normal(size=n)
    scores[:4] = scores[max(0, n - 32) :] = np.inf
    return scores


KINDS = ("gaussian", "negative", "equal", "few", "zeros", "extreme", "protected")


def ragged_scores(rng, lengths, draw):
    """Lay scores out as a pool's entries, and what is not a number everywhere else."""
    *_, positions, starts, lengths = ragged_pool(rng, lengths, HEAD_DIM, torch.float32)
    scores = np.full(len(positions), np.nan, np.float32)
    for start, n in zip(starts.tolist(), lengths.tolist(), strict=True):
        scores[start : start + n] = draw(n)
    return torch.from_numpy(scores).to(DEVICE), positions, starts, lengths


def segments(tensor, starts, lengths):
    """Cut what a block holds into a list of arrays."""
    entries = tensor.cpu().numpy()
    return [entries[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def int32(numbers):
    return torch.tensor(np.asarray(numbers), dtype=torch.int32, device=DEVICE)


def check_selection(select, pool, quotas, longest):
    scores, positions, starts, lengths = pool
    survivors, kept = torch.full_like(positions, -1), torch.full_like(lengths, -1)
    select(scores, starts, lengths, int32(quotas), survivors, kept, longest=longest)
    expected = np.full(len(positions), -1)
    parts = zip(
        *(segments(t, starts, lengths) for t in (scores, positions)), starts.tolist(), quotas, strict=True
    )
    for own, at, start, quota in parts:
        slots = select_slots(own, at, min(quota, len(own)), "chronological")
        expected[start : start + len(slots)] = slots
    np.testing.assert_array_equal(survivors.cpu(), expected)
    np.testing.assert_array_equal(kept.cpu(), np.minimum(quotas, lengths.cpu().numpy()))


@pytest.fixture(params=SELECT)
def select(request):
    return SELECT[request.param]


@pytest.fixture(params=DEMAND)
def demand(request):
    return DEMAND[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_scores_survive(rng, select, kind):
    pool = ragged_scores(rng, LENGTHS, lambda n: draw_scores(rng, kind, n))
    check_selection(select, pool, rng.integers(0, LENGTHS + 1), 700)


@pytest.mark.parametrize("quotas", [0 * LENGTHS, LENGTHS - 1, LENGTHS, LENGTHS + 5, LENGTHS // 2])
def test_quotas_from_none_to_more_than_all(rng, select, quotas):
    pool = ragged_scores(rng, LENGTHS, lambda n: draw_scores(rng, "few", n))
    check_selection(select, pool, quotas.clip(min=0), 700)


@pytest.mark.slow
@pytest.mark.parametrize("longest", [10, 20_000])
def test_the_kernel_selects_whatever_bound_it_is_given(rng, longest):
    # With the smaller bound, a block is 128 entries.
    pool = ragged_scores(rng, (300, 129, 128, 127), lambda n: draw_scores(rng, "few", n))
    check_selection(selection.select, pool, np.array([100, 60, 128, 90]), longest)


def test_the_twin_selects_with_any_bound_that_is_large_enough(rng):
    pool = ragged_scores(rng, (300, 129), lambda n: draw_scores(rng, "few", n))
    check_selection(twins.select, pool, np.array([100, 60]), 2000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "few"])
def test_segments_of_several_blocks(rng, select, kind):
    pool = ragged_scores(rng, (9000, 0), lambda n: draw_scores(rng, kind, n))
    check_selection(select, pool, np.array([4321, 3]), 9000)


def test_blocks_of_segments_do_not_change_the_twins(rng, monkeypatch):
    monkeypatch.setattr(twins, "_BLOCK_ELEMENTS", 3000)
    pool = ragged_scores(rng, LENGTHS, lambda n: draw_scores(rng, "few", n))
    check_selection(twins.select, pool, LENGTHS // 3, 700)
    check_demand(twins.demand, pool, np.array([200, 700]), 3, 700)


FEW = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 0.5, np.inf])


@pytest.mark.slow
@settings(MODERATE, max_examples=30)
@given(st.lists(st.lists(FEW, max_size=12), min_size=1, max_size=3), st.data())
def test_selection_of_drawn_ties(scores, data):
    own = iter([np.array(part, np.float32) for part in scores])
    lengths = [len(part) for part in scores]
    pool = ragged_scores(np.random.default_rng(0), lengths, lambda n: next(own))
    quotas = np.array([data.draw(st.integers(0, n + 1)) for n in lengths])
    for select in SELECT.values():
        check_selection(select, pool, quotas, max(lengths))


def count_winners(scores, total, monkeypatch):
    """Give what ReasonAlloc's heads demand, before it is smoothed and bounded."""
    with monkeypatch.context() as patched:
        patched.setattr(utility, "robustify", lambda demand, total, **_: demand)
        return utility.UtilityHeads().allocate(SimpleNamespace(scores=scores, total=total, protected=None))


def check_demand(demand, pool, totals, n_kv_heads, longest):
    scores, _, starts, lengths = pool
    counts = torch.full_like(lengths, -1)
    demand(scores, starts, lengths, int32(totals), counts, n_kv_heads=n_kv_heads, longest=longest)
    parts = segments(scores, starts, lengths)
    expected = [
        count_winners(parts[n_kv_heads * row : n_kv_heads * (row + 1)], total, pytest.MonkeyPatch())
        for row, total in enumerate(totals)
    ]
    np.testing.assert_array_equal(counts.cpu(), np.concatenate(expected))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_heads_demand_what_they_win(rng, demand, kind):
    pool = ragged_scores(rng, LENGTHS, lambda n: draw_scores(rng, kind, n))
    check_demand(demand, pool, rng.integers(1, LENGTHS.reshape(2, 3).sum(1)), 3, 700)


@pytest.mark.parametrize("totals", [(1, 1), (256, 1001), (255, 1000), (257, 5000)])
def test_totals_from_one_entry_to_more_than_all(rng, demand, totals):
    pool = ragged_scores(rng, LENGTHS, lambda n: draw_scores(rng, "few", n))
    check_demand(demand, pool, totals, 3, 700)


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_heads", [1, 3])
def test_any_number_of_heads_competes(rng, demand, n_kv_heads):
    pool = ragged_scores(rng, (40, 0, 300, 7, 200, 1), lambda n: draw_scores(rng, "gaussian", n))
    check_demand(demand, pool, [25, 20, 100, 3, 199, 1][: 6 // n_kv_heads], n_kv_heads, 300)


def test_a_contest_of_several_blocks(rng, demand):
    pool = ragged_scores(rng, (5000, 10, 4097), lambda n: draw_scores(rng, "few", n))
    check_demand(demand, pool, [4000], 3, 5000)


def test_nothing_held_demands_nothing(rng, demand, select):
    pool = ragged_scores(rng, (0, 0), lambda n: np.empty(0))
    for longest in (0, 9):
        check_demand(demand, pool, [3], 2, longest)
        check_selection(select, pool, np.array([0, 4]), longest)


class Row(SimpleNamespace):
    """One row's heads: old and new starts within a stretch, lengths, and the slots that survive."""


def draw_row(rng, n_kv_heads, longest, slack):
    """Draw heads that grow, shrink and move to either side; the stretch has room for all that is kept."""
    lengths = rng.integers(0, longest + 1, n_kv_heads)
    share = rng.random(n_kv_heads).round(1)
    survivors = [np.flatnonzero(rng.random(n) < p) for n, p in zip(lengths, share, strict=True)]
    kept = np.array([len(slots) for slots in survivors])
    stretch = int(lengths.sum()) + slack
    return Row(
        lengths=lengths,
        kept=kept,
        survivors=survivors,
        starts=draw_starts(rng, lengths, stretch),
        new_starts=draw_starts(rng, kept, stretch),
        stretch=stretch,
    )


def draw_starts(rng, lengths, stretch):
    """Put segments of these lengths into a stretch, in order, what is left anywhere between them."""
    free = np.sort(rng.integers(0, stretch - lengths.sum() + 1, len(lengths)))
    return free + np.cumsum(lengths) - lengths


def check_compaction(compact, rows, dtype=torch.float32):
    # The first row stands last.
    offsets = np.cumsum([2] + [row.stretch for row in rows[::-1]])
    capacity, offsets = offsets[-1] + 3, offsets[-2::-1]
    starts = np.concatenate([row.starts + at for row, at in zip(rows, offsets, strict=True)])
    new_starts = np.concatenate([row.new_starts + at for row, at in zip(rows, offsets, strict=True)])
    slots = [own for row in rows for own in row.survivors]
    survivors = np.full(capacity, 10**6, np.int32)
    old_slots = np.arange(capacity)
    for start, new_start, own in zip(starts, new_starts, slots, strict=True):
        survivors[start : start + len(own)] = own
        old_slots[new_start : new_start + len(own)] = start + own
    # Every number says which slot it was in; bfloat16 says it exactly up to 256 in two columns.
    before = torch.arange(capacity)
    keys = torch.stack([before % 200, before // 200] * (HEAD_DIM // 2), 1).to(DEVICE, dtype)
    pool = [keys, -keys, before.to(DEVICE, torch.int32)]
    expected = [tensor[torch.from_numpy(old_slots).to(DEVICE)] for tensor in pool]
    arrays = [torch.from_numpy(array).to(DEVICE) for array in (survivors, starts)]
    kept = int32(np.concatenate([row.kept for row in rows]))
    compact(*pool, *arrays, kept, torch.from_numpy(new_starts).to(DEVICE), n_kv_heads=len(rows[0].kept))
    for found, wanted in zip(pool, expected, strict=True):
        np.testing.assert_array_equal(found.float().cpu(), wanted.float().cpu())
    return before.numpy() - old_slots


@pytest.mark.slow
@pytest.mark.parametrize("compact", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("chunk", [2, 4, 64])
@settings(MODERATE, max_examples=12)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 25), st.integers(0, 12), st.integers(0, 2**20))
def test_survivors_move_in_place(compact, chunk, n_rows, n_kv_heads, longest, slack, seed):
    rng = np.random.default_rng(seed)
    rows = [draw_row(rng, n_kv_heads, longest, slack) for _ in range(n_rows)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compaction, "_CHUNK", chunk)
        check_compaction(compact, rows)


@pytest.mark.slow
@pytest.mark.parametrize("compact", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_heads_move_past_each_other(rng, compact, dtype):
    shifts = check_compaction(compact, [draw_row(rng, 4, 1500, 900), draw_row(rng, 4, 800, 0)], dtype)
    # Some move further than a chunk, to either side.
    assert shifts.min() < -600
    assert shifts.max() > 600


@pytest.mark.parametrize("compact", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("shift", [-40, -1, 0, 1, 40])
def test_a_whole_segment_shifts_over_itself(compact, shift):
    length = 1300
    own = Row(
        lengths=np.array([length]),
        kept=np.array([length]),
        survivors=[np.arange(length)],
        starts=np.array([40]),
        new_starts=np.array([40 + shift]),
        stretch=length + 80,
    )
    check_compaction(compact, [own])


def check_filling(fill, rng, lengths, kept, longest, dtype, with_survivors=True):
    source_keys, source_values, _, source_starts, _ = ragged_pool(rng, lengths, HEAD_DIM, dtype)
    keys, values, positions, starts, _ = ragged_pool(rng, kept, HEAD_DIM, dtype, room=2)
    # No two slots hold the same before.
    positions -= torch.arange(len(positions), dtype=torch.int32, device=DEVICE)
    # Where the survivors stand need not be where the source's entries do.
    survivor_starts = np.cumsum(lengths) - lengths
    survivors = np.full(sum(lengths) + 1, 10**6, np.int32)
    pool, expected = [keys, values, positions], [t.clone() for t in (keys, values, positions)]
    for n, n_kept, first, source, target in zip(
        lengths, kept, survivor_starts, source_starts.tolist(), starts.tolist(), strict=True
    ):
        own = np.sort(rng.permutation(n)[:n_kept]) if with_survivors else np.arange(n_kept)
        survivors[first : first + n_kept] = own
        own = torch.from_numpy(own)
        expected[0][target : target + n_kept] = source_keys[source + own]
        expected[1][target : target + n_kept] = source_values[source + own]
        expected[2][target : target + n_kept] = own
    fill(
        source_keys,
        source_values,
        source_starts,
        int32(survivors) if with_survivors else None,
        torch.from_numpy(survivor_starts).to(DEVICE),
        int32(kept),
        *pool,
        starts,
        longest=longest,
    )
    for found, wanted in zip(pool, expected, strict=True):
        np.testing.assert_array_equal(found.float().cpu(), wanted.float().cpu())


@pytest.mark.slow
@pytest.mark.parametrize("fill", FILL.values(), ids=FILL)
@pytest.mark.parametrize("with_survivors", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompts_survivors_are_copied(rng, fill, with_survivors, dtype):
    lengths = np.array([130, 7, 64, 65, 300, 1])
    for kept in (lengths // 2, lengths, np.array([0, 7, 64, 1, 299, 0])):
        check_filling(fill, rng, lengths, kept, 300, dtype, with_survivors)


@pytest.mark.parametrize("fill", FILL.values(), ids=FILL)
@pytest.mark.parametrize("longest", [0, 1, 40])
def test_nothing_is_copied_where_nothing_is_kept(rng, fill, longest):
    check_filling(fill, rng, np.array([5, 9]), np.array([0, 0]), longest, torch.float32)


@pytest.mark.parametrize("fill", FILL.values(), ids=FILL)
def test_filling_takes_any_bound_that_is_large_enough(rng, fill):
    check_filling(fill, rng, np.array([5, 90]), np.array([3, 70]), 1000, torch.float16)


def test_blocks_of_segments_do_not_change_filling(rng, monkeypatch):
    monkeypatch.setattr(twins, "_BLOCK_ELEMENTS", 150 * HEAD_DIM)
    check_filling(twins.fill, rng, np.array([5, 90, 0, 40]), np.array([0, 70, 0, 40]), 70, torch.float32)


def test_twins_ask_the_host_for_nothing():
    # Tensors without data refuse whatever depends on it.
    with FakeTensorMode():
        keys, values, scores = torch.empty(50, 16), torch.empty(50, 16), torch.empty(50)
        positions, survivors = torch.zeros(2, 50, dtype=torch.int32)
        starts, (lengths, kept) = torch.zeros(4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int32)
        twins.select(scores, starts, lengths, kept, survivors, kept.clone(), longest=9)
        twins.demand(scores, starts, lengths, kept[:2], kept, n_kv_heads=2, longest=9)
        twins.compact(keys, values, positions, survivors, starts, kept, starts, n_kv_heads=2)
        pool = keys, values, positions, starts
        twins.fill(keys, values, starts, survivors, starts, kept, *pool, longest=9)
        with pytest.raises(RuntimeError, match="nonzero"):
            scores[scores > 0]
