"""Attention over ragged segments and append: kernels and twins against float64 and plain NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from gpu_device import DEVICE, ragged_pool

pytest.importorskip("triton")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from validate.eviction.host.attention import attend_padded
from validate.eviction.kernels import append as append_kernel
from validate.eviction.kernels import attention, twins

ATTEND = {"kernel": attention.attend, "twin": twins.attend}
APPEND = {"kernel": append_kernel.append, "twin": twins.append}
# Around one tile and one block, several splits, and heads that hold nothing beside them.
LENGTHS = (0, 1, 127, 700, 128, 0, 129, 300)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


class Heads(NamedTuple):
    """What ``attend`` takes, but for its result."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


def make_heads(rng, lengths, group_size, head_dim, dtype=torch.float32, n_kv_heads=2):
    """Draw a pool and the queries of one token; values are about one at most, sums rounded accordingly."""
    keys, values, _, starts, lengths = ragged_pool(rng, lengths, head_dim, dtype)
    n_rows = len(lengths) // n_kv_heads
    queries = torch.from_numpy(rng.normal(size=(n_rows, n_kv_heads * group_size, head_dim)))
    return Heads(queries.to(DEVICE, dtype), keys, values / 4, starts, lengths)


def attended(attend, heads, longest=None, dtype=torch.float32, scale=None, **options):
    output = torch.full_like(heads.queries, torch.nan, dtype=dtype)
    longest = int(heads.lengths.max()) if longest is None else longest
    scale = heads.keys.shape[1] ** -0.5 if scale is None else scale
    attend(*heads, output, scale=scale, longest=longest, **options)
    return output.cpu()


def attend_naively(heads, scale=None):
    """Attend in float64, query head by query head."""
    queries, keys, values, starts, lengths = (tensor.cpu() for tensor in heads)
    scale = keys.shape[1] ** -0.5 if scale is None else scale
    grouped = queries.reshape(len(starts), -1, keys.shape[1]).double()
    output = torch.zeros_like(grouped)
    for own, query, start, n in zip(output, grouped, starts, lengths, strict=True):
        logits = scale * query @ keys[start : start + n].double().T
        own[:] = logits.softmax(1) @ values[start : start + n].double()
    return output.reshape(queries.shape)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


@pytest.fixture(params=ATTEND)
def attend(request):
    return ATTEND[request.param]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group_size"),
    [(torch.float32, 64, group_size) for group_size in (1, 2, 3, 4, 7, 8)]
    + [(torch.float32, 128, 4), (torch.bfloat16, 128, 1), (torch.bfloat16, 128, 7), (torch.bfloat16, 64, 4)]
    + [(torch.float16, 128, 8), (torch.float16, 64, 3), (torch.float32, 16, 2), (torch.bfloat16, 32, 2)],
)
def test_attention_over_ragged_heads(rng, attend, dtype, head_dim, group_size):
    heads = make_heads(rng, LENGTHS, group_size, head_dim, dtype)
    found = attended(attend, heads)
    torch.testing.assert_close(found.double(), attend_naively(heads), atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_agrees_with_the_padded_path(rng, attend, dtype):
    heads = make_heads(rng, (40, 3, 500, 1), 2, 64, dtype)
    single = Heads(*(tensor.float().cpu() for tensor in heads[:3]), *heads[3:])
    layout = [np.asarray(tensor.cpu(), np.int64).reshape(2, 2) for tensor in heads[3:]]
    expected = attend_padded(*single[:3], *layout, 0.125)
    torch.testing.assert_close(attended(attend, heads), expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_to_the_type_of_the_output(rng, attend, dtype):
    heads = make_heads(rng, LENGTHS, 2, 64, dtype)
    found, exact = attended(attend, heads, dtype=dtype), attended(attend, heads)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=1e-7, rtol=torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("longest", [0, 1, 700, 701, 6000])
def test_the_kernel_is_right_for_any_bound_of_the_lengths(rng, longest):
    heads = make_heads(rng, (700, 0, 129, 1), 2, 64)
    found = attended(attention.attend, heads, longest)
    torch.testing.assert_close(found.double(), attend_naively(heads), atol=1e-5, rtol=0)


def test_the_twin_takes_any_bound_that_is_large_enough(rng):
    heads = make_heads(rng, LENGTHS, 2, 64)
    found = attended(twins.attend, heads, 2000)
    torch.testing.assert_close(found, attended(twins.attend, heads), atol=1e-6, rtol=0)


def test_blocks_of_segments_do_not_change_the_twin(rng, monkeypatch):
    heads = make_heads(rng, LENGTHS, 2, 64)
    expected = attended(twins.attend, heads)
    monkeypatch.setattr(twins, "_BLOCK_ELEMENTS", 3 * 700 * 64)
    torch.testing.assert_close(attended(twins.attend, heads), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("longest", [0, 5, 3000])
def test_heads_without_entries_give_zeros(rng, attend, longest):
    heads = make_heads(rng, (0, 0, 0, 0), 3, 16)
    assert_equal(attended(attend, heads, longest), torch.zeros(2, 6, 16))


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_large_logits_do_not_overflow(rng, attend, scale):
    heads = make_heads(rng, (700, 300), 2, 64)
    found = attended(attend, heads, scale=scale)
    torch.testing.assert_close(found.double(), attend_naively(heads, scale), atol=1e-3, rtol=0)


def test_one_logit_far_above_the_others_takes_all(rng, attend):
    heads = make_heads(rng, (900,), 1, 64, n_kv_heads=1)
    for entry in (0, 450, 899):
        slot = heads.starts[0] + entry
        keys = heads.keys.clone()
        keys[slot] = 100 * heads.queries[0, 0]
        found = attended(attend, heads._replace(keys=keys))
        assert_equal(found[0, 0], heads.values[slot].cpu())


@pytest.mark.slow
@pytest.mark.parametrize("longest", [100, 700, 5000])
def test_scratch_is_written_before_it_is_read(rng, longest, monkeypatch):
    heads = make_heads(rng, (0, 300, 700, 1), 2, 64)
    expected = attended(attention.attend, heads, longest)
    scratch = attention.attention_scratch(heads.queries, len(heads.starts), longest)
    for part in scratch:
        part.fill_(torch.nan)
    monkeypatch.setattr(attention, "attention_scratch", lambda *_: scratch)
    for _ in range(2):
        assert_equal(attended(attention.attend, heads, longest), expected)


def test_long_segments_are_divided_and_short_ones_are_not(rng, monkeypatch):
    heads = make_heads(rng, (700, 10), 1, 64)
    scratch = attention.attention_scratch(heads.queries, 2, 700)
    monkeypatch.setattr(attention, "attention_scratch", lambda *_: scratch)
    attended(attention.attend, heads)
    held = (scratch[1] > -torch.inf).squeeze(2).cpu()
    assert held.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("n_segments", "longest", "n_splits"),
    [
        (512, 1024, 4),
        (8, 1024, 4),
        (8, 32768, 128),
        (1, 100, 1),
        (1, 0, 1),
        (4096, 2048, 1),
        (4096, 32768, 8),
    ],
)
def test_how_many_programs_share_a_segment(n_segments, longest, n_splits):
    queries = torch.empty(n_segments, 4, 128, dtype=torch.bfloat16)
    partials, lse = attention.attention_scratch(queries, n_segments, longest)
    assert lse.shape == (n_segments, n_splits, 4)
    assert partials.numel() == (n_segments * n_splits * 4 * 128 if n_splits > 1 else 0)


class Decode:
    """A pool and what it is to hold after each token, kept in NumPy."""

    def __init__(self, rng, n_rows, n_kv_heads, group_size, head_dim, dtype, window, room):
        self.rng, self.dtype, self.room = rng, dtype, room
        self.shape = n_rows, n_kv_heads, group_size, head_dim
        lengths = rng.integers(0, 5, n_rows * n_kv_heads)
        pool = ragged_pool(rng, lengths, head_dim, dtype, room)
        ring = torch.zeros(n_rows, n_kv_heads * group_size, window, head_dim, dtype=dtype, device=DEVICE)
        n_tokens = torch.from_numpy(rng.integers(5, 50, n_rows).astype(np.int32)).to(DEVICE)
        self.state = [*pool, n_tokens, ring]
        self.expected = [tensor.float().cpu().numpy().copy() for tensor in self.state]

    def draw(self, n_heads):
        """Draw one token's rows, laid out so that only the last dimension is contiguous."""
        n_rows, *_, head_dim = self.shape
        drawn = torch.from_numpy(self.rng.normal(size=(n_heads, n_rows, head_dim + 3)))
        return drawn.to(DEVICE, self.dtype)[:, :, :head_dim].transpose(0, 1)

    def step(self, append, with_ring=True):
        n_rows, n_kv_heads, group_size, _ = self.shape
        new = self.draw(n_kv_heads), self.draw(n_kv_heads), self.draw(n_kv_heads * group_size)
        assert not new[0].is_contiguous()
        append(*new, *self.state[:6], self.state[6] if with_ring else None)
        new_keys, new_values, new_queries = (tensor.float().cpu().numpy() for tensor in new)
        keys, values, positions, starts, lengths, n_tokens, ring = self.expected
        for row in range(n_rows):
            if with_ring and ring.shape[2]:
                ring[row, :, int(n_tokens[row]) % ring.shape[2]] = new_queries[row]
            for kv_head in range(n_kv_heads):
                segment = row * n_kv_heads + kv_head
                slot = int(starts[segment] + lengths[segment])
                keys[slot], values[slot] = new_keys[row, kv_head], new_values[row, kv_head]
                positions[slot] = n_tokens[row]
                lengths[segment] += 1
        self.check()
        self.state[5] += 1
        n_tokens += 1

    def check(self):
        for found, expected in zip(self.state, self.expected, strict=True):
            np.testing.assert_array_equal(found.float().cpu().numpy(), expected)


@pytest.mark.parametrize("append", APPEND.values(), ids=APPEND)
@pytest.mark.parametrize(
    ("n_rows", "n_kv_heads", "group_size", "head_dim", "dtype", "window"),
    [
        (3, 2, 1, 64, torch.float32, 4),
        (2, 3, 3, 128, torch.bfloat16, 3),
        (2, 1, 7, 16, torch.float16, 1),
        (1, 2, 4, 64, torch.bfloat16, 0),
    ],
)
def test_append_adds_one_token_per_row(rng, append, n_rows, n_kv_heads, group_size, head_dim, dtype, window):
    decode = Decode(rng, n_rows, n_kv_heads, group_size, head_dim, dtype, window, room=6)
    for _ in range(6):
        decode.step(append)


@pytest.mark.parametrize("append", APPEND.values(), ids=APPEND)
def test_append_without_a_ring_leaves_it_alone(rng, append):
    decode = Decode(rng, 2, 2, 2, 16, torch.float32, 4, room=2)
    decode.step(append, with_ring=False)
    decode.step(append)


@pytest.mark.slow
def test_kernels_repeat_bit_for_bit(rng):
    heads = make_heads(rng, LENGTHS, 3, 64, torch.bfloat16)
    first = attended(attention.attend, heads)
    assert_equal(attended(attention.attend, heads), first)


def test_twins_ask_the_host_for_nothing():
    # Tensors without data refuse whatever depends on it.
    with FakeTensorMode():
        pool = torch.empty(2, 50, 16)
        starts, lengths = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
        queries, kv = torch.empty(2, 4, 16), torch.empty(2, 2, 16)
        twins.attend(queries, *pool, starts, lengths, torch.empty(2, 4, 16), scale=1.0, longest=9)
        positions, n_tokens = torch.zeros(50, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        twins.append(kv, kv, queries, *pool, positions, starts, lengths, n_tokens, torch.empty(2, 4, 3, 16))
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            lengths.max().item()
