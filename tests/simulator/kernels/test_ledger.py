"""The ledger appends and evicts as a list would."""

from __future__ import annotations

import numpy as np
import pytest
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.kernels.ledger import NEVER, Ledger
from traces.numbers import STORAGE_DTYPES, round_to_storage, to_float32

TOTAL = 400

moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(
            st.just("retain"), st.sets(st.integers(0, 2)), st.booleans(), st.randoms(use_true_random=False)
        ),
    ),
    max_size=20,
)


@pytest.mark.slow
@given(moves, st.sampled_from(sorted(STORAGE_DTYPES)))
@MODERATE
def test_ledger_holds_what_lists_would(moves, dtype):
    drawn = np.random.default_rng(0).normal(size=(2, 3, TOTAL, 4)).astype(np.float32)
    stored = round_to_storage(drawn, dtype)
    keys, values = to_float32(stored, dtype)
    ledger = Ledger(3, 4, TOTAL, dtype, with_values=True)
    held = [[], [], []]
    evicted_at = np.full((3, TOTAL), NEVER)
    n_tokens = 0
    for move in moves:
        if move[0] == "append":
            stop = n_tokens + move[1]
            ledger.append(n_tokens, *stored[:, :, n_tokens:stop])
            for positions in held:
                positions.extend(range(n_tokens, stop))
            n_tokens = stop
        else:
            _, heads, in_order, random = move
            chosen = [None] * 3
            for head in heads:
                slots = random.sample(range(len(held[head])), random.randint(0, len(held[head])))
                slots = sorted(slots) if in_order else slots
                kept = [held[head][slot] for slot in slots]
                evicted_at[head, list(set(held[head]) - set(kept))] = n_tokens
                chosen[head], held[head] = np.array(slots, np.int64), kept
            ledger.retain(chosen, n_tokens)
        assert ledger.n_entries == sum(map(len, held))
        assert ledger.lengths.tolist() == [len(positions) for positions in held]
        for head, positions in enumerate(held):
            assert ledger.positions()[head].tolist() == positions
            np.testing.assert_array_equal(ledger.keys()[head], keys[head, positions])
            np.testing.assert_array_equal(ledger.values()[head], values[head, positions])
            multiplied = ledger.multiplied[head, : len(positions)]
            are_pairs = multiplied.shape[1] < keys.shape[2]
            assert not are_pairs or dtype == "bfloat16"
            expected = stored[0][head, positions] if are_pairs else keys[head, positions]
            np.testing.assert_array_equal(multiplied.view(expected.dtype), expected)
    np.testing.assert_array_equal(ledger.evicted_at, evicted_at)


def test_what_was_never_evicted_is_later_than_any_token():
    ledger = Ledger(1, 4, 5, "float32")
    ledger.append(0, np.zeros((1, 5, 4), np.float32))
    ledger.retain([np.array([4, 0])], 5)
    assert ledger.evicted_at.tolist() == [[NEVER, 5, 5, 5, NEVER]]
    assert NEVER > 10**9


def test_keys_of_any_strides_are_added(rng):
    keys = rng.normal(size=(4, 6, 2)).astype(np.float32).T
    ledger = Ledger(2, 4, 6, "float32")
    ledger.append(0, keys)
    assert ledger.values()[0].shape == (6, 0)
    for head in range(2):
        np.testing.assert_array_equal(ledger.keys()[head], keys[head])
    ledger.release()
    assert not ledger.keys()[0].size
    assert ledger.lengths.tolist() == [6, 6]
