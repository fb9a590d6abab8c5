"""Token ids and the text they stand for, as a trace stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from traces.foreign import as_numpy

MAX_TOKEN_ID = 2**31 - 1


def as_token_ids(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Convert token ids to int32 (total_tokens,).

    Raises
    ------
    ValueError
        If there are none, or one is not an integer from 0 to 2**31 - 1.
    """
    ids = as_numpy(token_ids, "token_ids")
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids is {ids.dtype} {ids.shape}; allowed: at least one integer")
    if int(ids.min()) < 0 or int(ids.max()) > MAX_TOKEN_ID:
        raise ValueError(f"token_ids are {ids.min()} to {ids.max()}; allowed: 0 to {MAX_TOKEN_ID}")
    return ids.astype(np.int32)


def as_vocabulary(vocabulary: Mapping[int, str]) -> dict[int, str]:
    """Convert a vocabulary to plain integers and strings.

    Raises
    ------
    ValueError
        If a key is no token id or a piece is no text.
    """
    pieces: dict[int, str] = {}
    for token_id, piece in vocabulary.items():
        if not isinstance(token_id, int | np.integer) or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ValueError(f"vocabulary has key {token_id!r}; allowed: 0 to {MAX_TOKEN_ID}")
        if not isinstance(piece, str):
            raise ValueError(f"vocabulary[{token_id}] is {piece!r}; allowed: text")
        pieces[int(token_id)] = piece
    return pieces
