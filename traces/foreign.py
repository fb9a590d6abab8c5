"""Arrays of other libraries as NumPy has them: whatever has ``__array__`` or DLPack, bfloat16 included."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_numpy(array: Any, name: str) -> np.ndarray:
    """Take an array of any library for NumPy's, without a copy where that can be.

    Parameters
    ----------
    array : array
        NumPy's or one with ``__array__`` or ``__dlpack__``, such as a tensor of torch or JAX, on any device.
    name : str
        What messages call it.

    Returns
    -------
    np.ndarray
        bfloat16 as uint16 bit patterns, or as float32 where its library has no other way out.

    Raises
    ------
    ValueError
        If it is no array of numbers, or has a mask, imaginary parts or objects.
    """
    try:
        found = _converted(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{name} is a {type(array).__name__} that gives no array: {words}") from None
    if isinstance(found, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array; allowed: one without a mask, such as array.filled(0)")
    if found.dtype.name == "bfloat16":  # of ml_dtypes
        found = found.view(np.uint16)
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {found.dtype}; allowed: real numbers")
    return found


def _converted(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):
        # A tensor may want a gradient or lie on a device, which NumPy's doors do not take.
        array = array.detach().cpu()
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError):
            return np.from_dlpack(array.float())
    if hasattr(array, "__array__"):
        return np.asarray(array)
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.array(array)
