"""Exact conversions between float32 and the 16-bit types a trace is stored in.

NumPy has no bfloat16, so a bfloat16 array is held as its uint16 bit patterns: the upper half of
the float32 with the same value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}

_BFLOAT16_EXPONENT = 0x7F80


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored numbers to float32, without rounding.

    Parameters
    ----------
    stored : np.ndarray
        Numbers in ``STORAGE_DTYPES[dtype]``, any shape and strides.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.

    Returns
    -------
    np.ndarray
        A new C-contiguous float32 array of the same shape.
    """
    if dtype == "float16":
        return _from_float16(stored)
    if dtype != "bfloat16":
        return np.array(stored, dtype=np.float32, order="C")
    bits = np.empty(stored.shape, dtype=np.uint32)
    np.left_shift(stored, np.uint32(16), out=bits, dtype=np.uint32)
    return bits.view(np.float32)


def _from_float16(stored: np.ndarray) -> np.ndarray:
    patterns = stored.view(np.uint16)
    bits = np.empty(stored.shape, np.uint32)
    np.bitwise_and(patterns, np.uint32(0x7FFF), out=bits, dtype=np.uint32)
    if bits.size and bits.max() >= 0x7C00:  # infinite or NaN
        return np.array(stored, dtype=np.float32, order="C")
    # NumPy converts one number at a time. Shifted, the bits are those of a float32 whose exponent is 112 too
    # small, subnormal numbers included.
    bits <<= 13
    converted = bits.view(np.float32)
    converted *= np.float32(2.0**112)
    signs = np.bitwise_and(patterns, np.uint32(0x8000), dtype=np.uint32)
    signs <<= 16
    bits |= signs
    return converted


def round_to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round numbers to a storage type, to nearest and ties to even.

    Parameters
    ----------
    values : np.ndarray
        Floating-point numbers; an array already in ``STORAGE_DTYPES[dtype]`` is returned as it is.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.

    Returns
    -------
    np.ndarray
        The numbers in ``STORAGE_DTYPES[dtype]``. What is too large becomes infinite.

    Raises
    ------
    ValueError
        If ``values`` are not floating-point numbers.
    """
    target = STORAGE_DTYPES[dtype]
    if values.dtype == target:
        return values
    if values.dtype.kind != "f":
        raise ValueError(f"numbers of type {values.dtype} found; allowed: {target} or any float")
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return values.astype(target)
        return _round_to_bfloat16(np.ascontiguousarray(values, dtype=np.float32))


def cast_exactly(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bring float32 numbers into a storage type, refusing any that would change.

    Raises
    ------
    ValueError
        If the type is neither the storage type nor float32, or a number would be rounded.
    """
    target = STORAGE_DTYPES[dtype]
    if values.dtype == target:
        return values
    if values.dtype != np.float32:
        raise ValueError(f"type {values.dtype} found; allowed: {target} for {dtype}, or float32")
    stored = round_to_storage(values, dtype)
    if not np.array_equal(to_float32(stored, dtype), values):
        raise ValueError(f"float32 numbers found that {dtype} cannot hold without rounding")
    return stored


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Tell whether no stored number is infinite or NaN."""
    if dtype != "bfloat16":
        return bool(np.isfinite(stored).all())
    return bool(((stored & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT).all())


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    upper = bits >> 16
    # Half of the lower 16 bits, plus one if the upper half is odd: ties then go to even.
    rounded = (bits + (np.uint32(0x7FFF) + (upper & 1))) >> 16
    # Rounding would carry a NaN into infinity; keep its upper half and set the quiet bit.
    return np.where(np.isnan(values), upper | 0x40, rounded).astype(np.uint16)
