"""The ledger appends and evicts as a list would."""

from __future__ import annotations

import numpy as np
from cases import MODERATE
from hypothesis import given
from hypothesis import strategies as st

from simulator.ledger import NEVER, Ledger

TOTAL = 400

moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("retain"), st.integers(0, 2), st.randoms(use_true_random=False)),
    ),
    max_size=20,
)


@given(moves)
@MODERATE
def test_ledger_holds_what_lists_would(moves):
    keys = np.random.default_rng(0).normal(size=(3, TOTAL, 4)).astype(np.float32)
    ledger = Ledger(3, 4, TOTAL)
    held = [[], [], []]
    evicted_at = np.full((3, TOTAL), NEVER)
    n_tokens = 0
    for move in moves:
        if move[0] == "append":
            stop = n_tokens + move[1]
            ledger.append(n_tokens, keys[:, n_tokens:stop])
            for positions in held:
                positions.extend(range(n_tokens, stop))
            n_tokens = stop
        else:
            _, head, random = move
            slots = random.sample(range(len(held[head])), random.randint(0, len(held[head])))
            ledger.retain(head, np.array(slots, np.int64), n_tokens)
            kept = [held[head][slot] for slot in slots]
            evicted_at[head, list(set(held[head]) - set(kept))] = n_tokens
            held[head] = kept
        assert ledger.n_entries == sum(map(len, held))
        assert ledger.lengths.tolist() == [len(positions) for positions in held]
        for head, positions in enumerate(held):
            assert ledger.positions(head).tolist() == positions
            np.testing.assert_array_equal(ledger.keys(head), keys[head, positions])
    np.testing.assert_array_equal(ledger.evicted_at, evicted_at)


def test_what_was_never_evicted_is_later_than_any_token():
    ledger = Ledger(1, 4, 5)
    ledger.append(0, np.zeros((1, 5, 4), np.float32))
    ledger.retain(0, np.array([4, 0]), 5)
    assert ledger.evicted_at.tolist() == [[NEVER, 5, 5, 5, NEVER]]
    assert NEVER > 10**9
