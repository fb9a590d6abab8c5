"""Stored numbers, read by address and made float32 within compiled loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from simulator.cpu import cpu_features, is_arm

# How numbers are stored; see ``traces.numbers``.
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}

# Halves that are converted by one instruction, where the machine has it.
_HALVES = 16
_HAS_HALVES = "f16c" in cpu_features() or is_arm()


@intrinsic
def floats_at(typing_context: Any, address: Any) -> tuple[Any, Callable]:
    """Give an address as a pointer to float32 numbers."""
    return _pointer(types.float32, address)


@intrinsic
def _bits_at(typing_context: Any, address: Any) -> tuple[Any, Callable]:
    return _pointer(types.uint16, address)


def _pointer(kind: Any, address: Any) -> tuple[Any, Callable]:
    signature = types.CPointer(kind)(address)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def _widen_halves(typing_context: Any, address: Any, numbers: Any, first: Any) -> tuple[Any, Callable]:
    """Write the ``_HALVES`` float16 numbers at an address to a flat float32 array, from ``first`` on."""
    signature = types.void(types.int64, numbers, types.int64)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        address, numbers, first = arguments
        halves, floats = (ir.VectorType(kind, _HALVES) for kind in (ir.HalfType(), ir.FloatType()))
        loaded = builder.load(builder.inttoptr(address, halves.as_pointer()))
        loaded.align = 2
        target = context.make_array(signature.args[1])(context, builder, numbers).data
        place = builder.bitcast(builder.gep(target, [first]), floats.as_pointer())
        builder.store(builder.fpext(loaded, floats), place).align = 4
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True)
def widen_rows(address, stride, kind, n_rows, width, numbers, first, step):
    """Write rows of stored numbers as float32; exact.

    Parameters
    ----------
    address, stride : int
        Where the first row begins, and the bytes from one to the next; the numbers of a row have no gaps.
    kind : int
        Of ``KINDS``.
    n_rows, width : int
    numbers : float32 (n,)
        Updated.
    first, step : int
        Where in ``numbers`` the first row belongs, and how far behind it the next one.
    """
    n_whole = 0
    if kind == 1 and _HAS_HALVES:
        n_whole = width // _HALVES * _HALVES
        for row in range(n_rows):
            for i in range(0, n_whole, _HALVES):
                _widen_halves(address + row * stride + 2 * i, numbers, first + row * step + i)
        if n_whole == width:
            return
    factor = np.float32(2.0**112)
    for row in range(n_rows):
        target = first + row * step
        if kind == 0:
            floats = carray(floats_at(address + row * stride), (width,))
            for i in range(width):
                numbers[target + i] = floats[i]
            continue
        bits = carray(_bits_at(address + row * stride), (width,))
        if kind == 2:
            # The bits of a bfloat16 are the upper half of a float32's.
            for i in range(width):
                numbers[target + i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)
            continue
        for i in range(n_whole, width):
            # Shifted, the bits are those of a float32 of an exponent 112 too small, also if subnormal.
            size = np.uint32(np.uint32(bits[i] & np.uint16(0x7FFF)) << np.uint32(13))
            found = np.float32(np.uint32(size).view(np.float32) * factor).view(np.uint32)
            # What is infinite or not a number has an exponent of its own.
            found = np.uint32(size | np.uint32(0x7F800000)) if size >= np.uint32(0x0F800000) else found
            sign = np.uint32(np.uint32(bits[i] & np.uint16(0x8000)) << np.uint32(16))
            numbers[target + i] = np.uint32(found | sign).view(np.float32)
