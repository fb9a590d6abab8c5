"""The pool of a layer against a dictionary of lists; attention over it against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import MODERATE
from gpu_device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from validate.eviction.host import attention as kernels
from validate.eviction.host.attention import (
    attend_by,
    attend_padded,
    attend_ragged,
    blocks_of_like_length,
    has_kernels,
)
from validate.eviction.host.pool import LayerPool
from validate.eviction.kernels.ops import torch_ops, triton_ops

WIDTH = 3


def entry(serial, kv_head, position):
    """Make a key that says whose it is; its value is minus that."""
    return [float(serial), float(kv_head), float(position)]


class Twin:
    """What every KV head of every sequence holds: a list of positions."""

    def __init__(self, held):
        self.serials = list(range(len(held)))
        self.held = {
            (serial, kv_head): own for serial, heads in enumerate(held) for kv_head, own in enumerate(heads)
        }
        self.n_tokens = [max(map(max, heads)) + 1 for heads in held]

    def heads(self, row):
        return [own for (serial, _), own in self.held.items() if serial == self.serials[row]]

    def append(self, n_new):
        for row, n_tokens in enumerate(self.n_tokens):
            for own in self.heads(row):
                own += range(n_tokens, n_tokens + n_new)
        self.n_tokens = [n_tokens + n_new for n_tokens in self.n_tokens]

    def retain(self, row, survivors):
        for own, slots in zip(self.heads(row), survivors, strict=True):
            own[:] = own if slots is None else [own[slot] for slot in slots]

    def keep_rows(self, rows):
        self.serials = [self.serials[row] for row in rows]
        self.n_tokens = [self.n_tokens[row] for row in rows]


def assert_same(pool, twin):
    """Compare positions, keys and values, and see that nobody's room is another's."""
    taken = np.zeros(len(pool.keys), int)
    for row, serial in enumerate(twin.serials):
        for kv_head, own in enumerate(twin.heads(row)):
            slots = pool.segment(row, kv_head)
            expected = [entry(serial, kv_head, position) for position in own]
            assert pool.positions[slots].tolist() == own
            assert pool.keys[slots].tolist() == expected
            assert (-pool.values[slots]).tolist() == expected
            taken[slots.start : slots.stop + pool.room[row]] += 1
            assert slots.stop + pool.room[row] <= len(pool.keys)
    assert taken.max() == 1
    assert len(pool.starts) == len(pool.lengths) == len(pool.room) == len(twin.serials)
    assert pool.bytes_allocated == 2 * len(pool.keys) * WIDTH * 4
    return taken


def filled(twin, n_kv_heads, room, padding=0):
    """Make a pool of what the twin holds, from whole prompts with padding before them."""
    length = max(twin.n_tokens) + padding
    paddings = [length - n for n in twin.n_tokens]
    keys = torch.full((len(paddings), n_kv_heads, length, WIDTH), torch.nan)
    for row, padding in enumerate(paddings):
        for kv_head in range(n_kv_heads):
            for position in range(twin.n_tokens[row]):
                keys[row, kv_head, padding + position] = torch.tensor(entry(row, kv_head, position))
    pool = LayerPool(len(paddings), n_kv_heads, WIDTH, torch.float32, torch.device("cpu"))
    held = [[np.array(own) for own in twin.heads(row)] for row in range(len(paddings))]
    pool.fill(keys, -keys, held, np.array(paddings), np.array(room))
    return pool


@pytest.mark.slow
@settings(MODERATE, max_examples=80)
@given(st.data())
def test_a_pool_holds_what_a_dictionary_of_lists_holds(data):
    n_rows, n_kv_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rooms = st.integers(0, 6)
    held = st.lists(st.integers(0, 9), min_size=1, unique=True)
    twin = Twin([[data.draw(held) for _ in range(n_kv_heads)] for _ in range(n_rows)])
    pool = filled(twin, n_kv_heads, [data.draw(rooms) for _ in range(n_rows)], data.draw(st.integers(0, 2)))
    assert assert_same(pool, twin).all()
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["append", "append", "retain", "make_room", "keep_rows"]))
        if kind == "append":
            n_new = data.draw(st.integers(1, 3))
            if (pool.room < n_new).any():
                pool.make_room(np.maximum(pool.room, n_new))
            keys = torch.tensor(
                [
                    [
                        [entry(serial, kv_head, n_tokens + new) for new in range(n_new)]
                        for kv_head in range(n_kv_heads)
                    ]
                    for serial, n_tokens in zip(twin.serials, twin.n_tokens, strict=True)
                ]
            )
            pool.append(keys, -keys, np.array(twin.n_tokens))
            twin.append(n_new)
        elif kind == "retain":
            row, room = data.draw(st.integers(0, len(twin.serials) - 1)), data.draw(rooms)
            survivors = [
                data.draw(
                    st.none()
                    | st.lists(st.sampled_from(range(len(own))), min_size=1, unique=True).map(np.array)
                )
                for own in twin.heads(row)
            ]
            pool.retain(row, survivors, room)
            twin.retain(row, survivors)
            assert pool.room[row] >= room
        elif kind == "make_room":
            room = np.array([data.draw(rooms) for _ in twin.serials])
            pool.make_room(room)
            assert (pool.room >= room).all()
        else:
            rows = data.draw(st.lists(st.sampled_from(range(len(twin.serials))), min_size=1, unique=True))
            pool.keep_rows(np.array(rows))
            twin.keep_rows(rows)
        taken = assert_same(pool, twin)
        # A block laid out anew has no slot to spare.
        assert taken.all() or kind in ("retain", "append")


def test_what_one_head_gives_up_another_takes_without_more_memory():
    twin = Twin([[list(range(10)), list(range(10))]])
    pool = filled(twin, 2, [5])
    before = pool.bytes_allocated
    pool.retain(0, [np.array([9]), None], 9)
    twin.retain(0, [[9], None])
    assert_same(pool, twin)
    assert pool.room.tolist() == [9]
    assert pool.bytes_allocated == before


def test_a_stretch_that_is_half_empty_shrinks():
    twin = Twin([[list(range(50))], [list(range(9))]])
    pool = filled(twin, 1, [5, 5])
    for n_kept, n_slots in ((25, 55), (20, 25)):
        pool.retain(0, [np.arange(n_kept)], 5)
        twin.retain(0, [range(n_kept)])
        assert_same(pool, twin)
        assert len(pool.keys) == n_slots + 9 + 5


def attend_naively(queries, keys, values, starts, lengths, scale):
    """Attend in float64, head by head."""
    output = torch.empty(queries.shape, dtype=torch.float64)
    group_size = queries.shape[1] // starts.shape[1]
    for row, head in np.ndindex(queries.shape[:2]):
        start, n = starts[row, head // group_size], lengths[row, head // group_size]
        weights = (scale * keys[start : start + n].double() @ queries[row, head].double()).softmax(0)
        output[row, head] = weights @ values[start : start + n].double()
    return output


def random_pool(rng, lengths, group_size, width, dtype=torch.float32, sharpness=1.0):
    """Lay heads of given lengths out with gaps, which hold no numbers."""
    n_rows, n_kv_heads = lengths.shape
    gaps = rng.integers(0, 4, lengths.size)
    starts = np.cumsum(gaps + lengths.reshape(-1)) - lengths.reshape(-1)
    keys, values = torch.full((2, starts[-1] + lengths[-1, -1] + 2, width), torch.nan)
    for start, n in zip(starts, lengths.reshape(-1), strict=True):
        keys[start : start + n] = torch.from_numpy(rng.normal(size=(n, width)) * sharpness)
        values[start : start + n] = torch.from_numpy(rng.normal(size=(n, width)))
    queries = torch.from_numpy(rng.normal(size=(n_rows, n_kv_heads * group_size, width)))
    queries, keys, values = (tensor.to(dtype) for tensor in (queries, keys, values))
    return queries, keys, values, starts.reshape(lengths.shape), lengths


LENGTHS = {
    "ones": np.ones((3, 2), np.int64),
    "unequal": np.array([[1, 40, 7], [300, 2, 12]]),
    "one head": np.array([[17]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("attend", [attend_ragged, attend_padded])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("group_size", "width"), [(1, 8), (4, 5)])
def test_attention_over_ragged_heads(rng, attend, lengths, group_size, width):
    heads = random_pool(rng, lengths, group_size, width)
    found = attend(*heads, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attend_naively(*heads, 0.7), atol=2e-6, rtol=0)


@pytest.mark.parametrize("ops", [torch_ops, triton_ops])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_of_a_gpu_over_what_the_host_lays_out(rng, ops, lengths):
    heads = [
        part.to(DEVICE) if isinstance(part, torch.Tensor) else part
        for part in random_pool(rng, lengths, 4, 16)
    ]
    assert has_kernels(heads[0], lengths.size)
    found = attend_by(ops(), *heads, 0.7)
    torch.testing.assert_close(found.double(), attend_naively(*heads, 0.7), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("group_size", "width"), [(4, 5), (16, 16)])
def test_kernels_refuse_other_heads(rng, group_size, width):
    queries, *_, lengths = random_pool(rng, LENGTHS["one head"], group_size, width)
    assert not has_kernels(queries, lengths.size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_are_attended_to_in_single_precision(rng, dtype):
    heads = random_pool(rng, LENGTHS["unequal"], 2, 8, dtype)
    found = attend_ragged(*heads, 0.7)
    assert found.dtype == dtype
    # Only the result is rounded.
    expected = attend_naively(*heads, 0.7)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_number_stays_none(rng, dtype, part):
    heads = random_pool(rng, LENGTHS["one head"], 2, 24, dtype)
    heads[part].view(-1, 24)[heads[3][0, 0] if part else 0, 3] = torch.nan
    assert attend_ragged(*heads, 0.7)[0, 0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_change_nothing(rng, monkeypatch, dtype):
    heads = random_pool(rng, LENGTHS["unequal"], 2, 24, dtype)
    alone = attend_ragged(*heads, 0.7)
    monkeypatch.setattr(kernels, "_ENTRIES_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attend_ragged(*heads, 0.7), alone)


@pytest.mark.parametrize("attend", [attend_ragged, attend_padded])
def test_large_logits_do_not_overflow(rng, attend):
    heads = random_pool(rng, LENGTHS["unequal"], 2, 8, sharpness=200)
    torch.testing.assert_close(attend(*heads, 1.0).double(), attend_naively(*heads, 1.0), atol=1e-3, rtol=0)


def test_queries_may_be_a_view_of_another_order(rng):
    queries, *pool = random_pool(rng, LENGTHS["unequal"], 2, 8)
    turned = queries.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(attend_ragged(turned, *pool, 0.7), attend_ragged(queries, *pool, 0.7))


@pytest.mark.parametrize("most", [1, 50, 10_000])
def test_blocks_of_heads_do_not_change_attention(rng, monkeypatch, most):
    heads = random_pool(rng, LENGTHS["unequal"], 2, 8)
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", most * 8)
    torch.testing.assert_close(
        attend_padded(*heads, 0.7).double(), attend_naively(*heads, 0.7), atol=2e-6, rtol=0
    )


@settings(MODERATE)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60).map(np.array), st.integers(1, 1000))
def test_a_block_of_heads_padded_to_its_longest_fits(lengths, most):
    blocks = list(blocks_of_like_length(lengths, most))
    assert sorted(np.concatenate(blocks)) == list(range(len(lengths)))
    assert all(len(block) == 1 or len(block) * lengths[block].max() <= most for block in blocks)
