"""Stored numbers, read by address and made float32 within compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from simulator.kernels.compiled import compiled
from simulator.kernels.cpu import cpu_features, is_arm

# How numbers are stored; see ``traces.numbers``.
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}

# Numbers that are converted at once, float16 only where the machine has an instruction for it.
_AT_ONCE = 16
_BITS, _FLOAT = ir.IntType(16), ir.FloatType()
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
    """Write the ``_AT_ONCE`` float16 numbers at an address to a flat float32 array, from ``first`` on."""

    def convert(builder: ir.IRBuilder, loaded: Any) -> Any:
        halves = builder.bitcast(loaded, ir.VectorType(ir.HalfType(), _AT_ONCE))
        return builder.fpext(halves, ir.VectorType(_FLOAT, _AT_ONCE))

    return _widen_vector(numbers, convert)


@intrinsic
def _widen_bfloats(typing_context: Any, address: Any, numbers: Any, first: Any) -> tuple[Any, Callable]:
    """Do the same for bfloat16, whose bits are the upper half of a float32's."""

    def convert(builder: ir.IRBuilder, loaded: Any) -> Any:
        wide = ir.VectorType(ir.IntType(32), _AT_ONCE)
        bits = builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * _AT_ONCE))
        return builder.bitcast(bits, ir.VectorType(_FLOAT, _AT_ONCE))

    return _widen_vector(numbers, convert)


@intrinsic
def _copy_floats(typing_context: Any, address: Any, numbers: Any, first: Any) -> tuple[Any, Callable]:
    """Do the same for float32."""
    return _widen_vector(numbers, lambda builder, loaded: loaded, _FLOAT)


def _widen_vector(
    numbers: Any, convert: Callable[[ir.IRBuilder, Any], Any], number: Any = _BITS
) -> tuple[Any, Callable]:
    signature = types.void(types.int64, numbers, types.int64)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        address, numbers, first = arguments
        stored = ir.VectorType(number, _AT_ONCE).as_pointer()
        loaded = builder.load(builder.inttoptr(address, stored))
        loaded.align = 2
        target = builder.gep(context.make_array(signature.args[1])(context, builder, numbers).data, [first])
        converted = convert(builder, loaded)
        builder.store(converted, builder.bitcast(target, converted.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate


@compiled(nogil=True)
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
    if kind != 1 or _HAS_HALVES:
        n_whole = width // _AT_ONCE * _AT_ONCE
        for row in range(n_rows):
            at, target = address + row * stride, first + row * step
            if kind == 0:
                for i in range(0, n_whole, _AT_ONCE):
                    _copy_floats(at + 4 * i, numbers, target + i)
            elif kind == 2:
                for i in range(0, n_whole, _AT_ONCE):
                    _widen_bfloats(at + 2 * i, numbers, target + i)
            elif _HAS_HALVES:  # known when compiled: what there is no instruction for is left out
                for i in range(0, n_whole, _AT_ONCE):
                    _widen_halves(at + 2 * i, numbers, target + i)
        if n_whole == width:
            return
    factor = np.float32(2.0**112)
    for row in range(n_rows):
        target = first + row * step
        if kind == 0:
            floats = carray(floats_at(address + row * stride), (width,))
            for i in range(n_whole, width):
                numbers[target + i] = floats[i]
            continue
        bits = carray(_bits_at(address + row * stride), (width,))
        if kind == 2:
            for i in range(n_whole, width):
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


@compiled(nogil=True)
def widen_blocks(address, strides, kind, n_rows, firsts, blocks):
    """Write ``n_rows`` stored rows to each of several blocks as float32.

    Parameters
    ----------
    address : int
        Of (n_blocks, n_rows, width) numbers; those of a row have no gaps.
    strides : int64 (2,)
        Bytes from one block, and from one row, to the next.
    kind : int
        Of ``KINDS``.
    n_rows : int
    firsts : int64 (n_blocks,)
        Where in each block the first row belongs.
    blocks : float32 (n_blocks, capacity, width)
        Updated.
    """
    n_blocks, capacity, width = blocks.shape
    flat = blocks.reshape(-1)
    for block in range(n_blocks):
        first = (block * capacity + firsts[block]) * width
        widen_rows(address + block * strides[0], strides[1], kind, n_rows, width, flat, first, width)


@compiled(nogil=True)
def narrow(address, n_numbers, narrowed):
    """Write float32 numbers as bfloat16, uint16 (n,), cut off; say whether none lost anything."""
    numbers, rest = carray(floats_at(address), (n_numbers,)), np.uint32(0)
    for i in range(n_numbers):
        bits = np.float32(numbers[i]).view(np.uint32)
        rest |= bits & np.uint32(0xFFFF)
        narrowed[i] = np.uint16(bits >> np.uint32(16))
    return rest == 0


def whole_rows(stored: np.ndarray) -> np.ndarray:
    """Give an array of which the numbers of a row stand side by side, a copy only if they do not."""
    return stored if stored.strides[-1] == stored.itemsize else np.ascontiguousarray(stored)


def address_of(array: np.ndarray) -> int:
    """Give where an array begins; it has to be kept while that is used."""
    return int(array.__array_interface__["data"][0])


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Make stored numbers float32; (n_blocks, n_rows, width)."""
    stored, blocks = whole_rows(stored), np.empty(stored.shape, np.float32)
    at, strides = address_of(stored), np.array(stored.strides[:2])
    widen_blocks(at, strides, KINDS[dtype], stored.shape[1], np.zeros(len(blocks), np.int64), blocks)
    return blocks


@compiled()
def _first_of(numbers):
    """Do what ``address_of`` does in an eighth of the time, but not for float16, unknown to Numba."""
    return numbers.ctypes.data


def addresses(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """Give where float32 arrays begin, int64 (n,), 0 for None; to be kept while those are used."""
    return np.array([0 if own is None else _first_of(own) for own in arrays], np.int64)
