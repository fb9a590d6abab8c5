"""Stored vectors times float32 ones, summed over heads, without a float32 copy of what is stored."""

from __future__ import annotations

import numpy as np

from simulator.kernels.compiled import compiled
from simulator.kernels.widening import KINDS, address_of, whole_rows, widen_rows


def products(stored: np.ndarray, dtype: str, outputs: np.ndarray) -> np.ndarray:
    """Sum stored numbers times ``outputs`` over heads and width.

    Parameters
    ----------
    stored : (n_draws, n_heads, n_tokens, width)
        In the type ``dtype``, bfloat16 as uint16 bit patterns.
    dtype : str
        One of ``KINDS``.
    outputs : float32 (n_heads, n_tokens, width)

    Returns
    -------
    float32 (n_draws, n_tokens)
    """
    stored, found = whole_rows(stored), np.empty((stored.shape[0], stored.shape[2]), np.float32)
    strides = np.array(stored.strides[:3])
    _products(address_of(stored), strides, KINDS[dtype], np.ascontiguousarray(outputs), found)
    return found


@compiled(nogil=True)
def _products(address, strides, kind, outputs, found):
    n_heads, n_tokens, width = outputs.shape
    row, total = np.empty(width, np.float32), np.empty(width, np.float32)
    for draw in range(len(found)):
        for token in range(n_tokens):
            total[:] = 0
            at = address + draw * strides[0] + token * strides[2]
            for head in range(n_heads):
                widen_rows(at + head * strides[1], 0, kind, 1, width, row, 0, width)
                # Number by number, which many do at once; one sum over all would have to go in order.
                for i in range(width):
                    total[i] += row[i] * outputs[head, token, i]
            sum_of_all = np.float32(0)
            for i in range(width):
                sum_of_all += total[i]
            found[draw, token] = sum_of_all
