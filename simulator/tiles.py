"""Dot products of a few keys with a few queries, formed in registers, to be summed or compared at once.

A matrix product of the whole would write all products to memory first. A product here is one sum over the
dimensions in their order, whatever stands beside it, so that it is the same in every place it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from simulator.compiled import compiled
from simulator.cpu import cpu_features, is_arm


def _register_plan() -> tuple[int, int, int]:
    """Choose rows, vectors a row, and numbers a vector, so that all products of a tile stay in registers."""
    features = cpu_features()
    if "avx512f" in features:
        return 12, 2, 16  # 24 of 32 registers
    if {"avx2", "fma"} <= features:
        return 6, 2, 8  # 12 of 16
    return (6, 4, 4) if is_arm() else (6, 2, 4)  # 24 of 32; 12 of 16


# Keys of a tile, queries of a tile (a panel), and numbers of a vector.
ROWS, _VECTORS, _LANES = _register_plan()
WIDTH = _VECTORS * _LANES

_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, _LANES)


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _vector_at(builder: ir.IRBuilder, numbers: Any, offset: Any) -> Any:
    return builder.bitcast(builder.gep(numbers, [offset]), _VECTOR.as_pointer())


def _load(builder: ir.IRBuilder, place: Any) -> Any:
    loaded = builder.load(place)
    loaded.align = 4
    return loaded


def _store(builder: ir.IRBuilder, vector: Any, place: Any) -> None:
    builder.store(vector, place).align = 4


def _repeat(builder: ir.IRBuilder, number: Any) -> Any:
    unset = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(unset, number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, unset, ir.Constant(ir.VectorType(_INT32, _LANES), [0] * _LANES))


def _numbers_of(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> tuple[Any, Any, Any]:
    """Give where a float32 array of two dimensions begins, its rows, and the numbers from one to the next."""
    struct = context.make_array(kind)(context, builder, array)
    n_rows = builder.extract_value(struct.shape, 0)
    stride = builder.sdiv(builder.extract_value(struct.strides, 0), _index(4))
    return struct.data, n_rows, stride


@intrinsic
def multiply_tile(typing_context: Any, keys: Any, n_rows: Any, panel: Any, tile: Any) -> tuple[Any, Callable]:
    """Write ``tile = keys @ panel``; from row ``n_rows`` on it repeats the last key's.

    ``keys`` is the address of ``n_rows`` keys, 1 to ``ROWS``, float32, row by row; ``panel`` float32
    (head_dim, WIDTH); ``tile`` float32 (ROWS, WIDTH), whose rows are each without gaps, is written.
    """
    signature = types.void(types.int64, types.int64, panel, tile)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        keys, n_rows, panel, tile = arguments
        panel, depth, _ = _numbers_of(context, builder, signature.args[2], panel)
        tile, _, stride = _numbers_of(context, builder, signature.args[3], tile)
        first = builder.inttoptr(keys, _FLOAT.as_pointer())
        last = builder.sub(n_rows, _index(1))
        rows = []
        for row in range(ROWS):
            held = builder.select(builder.icmp_signed("<", _index(row), n_rows), _index(row), last)
            rows.append(builder.gep(first, [builder.mul(held, depth)]))
        zero = ir.Constant(_VECTOR, [0.0] * _LANES)
        sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(_VECTORS)] for _ in rows]
        for own in sums:
            for place in own:
                builder.store(zero, place)
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fmuladd = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_LANES}f32")
        with cgutils.for_range(builder, depth) as loop:
            start = builder.mul(loop.index, _index(WIDTH))
            queries = [
                _load(builder, _vector_at(builder, panel, builder.add(start, _index(i * _LANES))))
                for i in range(_VECTORS)
            ]
            for row, own in zip(rows, sums, strict=True):
                key = _repeat(builder, builder.load(builder.gep(row, [loop.index])))
                for query, place in zip(queries, own, strict=True):
                    builder.store(builder.call(fmuladd, [key, query, builder.load(place)]), place)
        for row, own in enumerate(sums):
            for i, place in enumerate(own):
                at = builder.add(builder.mul(_index(row), stride), _index(i * _LANES))
                _store(builder, builder.load(place), _vector_at(builder, tile, at))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _transpose(typing_context: Any, block: Any, turned: Any) -> tuple[Any, Callable]:
    """Write ``turned = block.T``, both float32 (_LANES, _LANES), whose rows are each without gaps."""
    signature = types.void(block, turned)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (block, _, stride), (turned, _, turned_stride) = (
            _numbers_of(context, builder, kind, array)
            for kind, array in zip(signature.args, arguments, strict=True)
        )
        rows = [
            _load(builder, _vector_at(builder, block, builder.mul(_index(row), stride)))
            for row in range(_LANES)
        ]
        # Blocks of 1, 2, 4, ... numbers change places across the diagonal.
        size = 1
        while size < _LANES:
            is_left = [lane & size == 0 for lane in range(_LANES)]
            upper = [lane if left else _LANES + lane - size for lane, left in enumerate(is_left)]
            lower = [lane + size if left else _LANES + lane for lane, left in enumerate(is_left)]
            masks = [ir.Constant(ir.VectorType(_INT32, _LANES), lanes) for lanes in (upper, lower)]
            for row in range(_LANES):
                if not row & size:
                    pair = rows[row], rows[row + size]
                    rows[row], rows[row + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            size *= 2
        for row, vector in enumerate(rows):
            at = builder.mul(_index(row), turned_stride)
            _store(builder, vector, _vector_at(builder, turned, at))
        return context.get_dummy_value()

    return signature, generate


@compiled(nogil=True)
def fill_panel(queries, panel):
    """Write ``panel = queries.T``: float32 (WIDTH, head_dim) becomes (head_dim, WIDTH)."""
    head_dim = queries.shape[1]
    n_whole = head_dim // _LANES * _LANES
    for d in range(0, n_whole, _LANES):
        for first in range(0, WIDTH, _LANES):
            block = queries[first : first + _LANES, d : d + _LANES]
            _transpose(block, panel[d : d + _LANES, first : first + _LANES])
    for d in range(n_whole, head_dim):
        for query in range(WIDTH):
            panel[d, query] = queries[query, d]


@njit(inline="always")
def hide_unseen(tile, first_slot, slots, group_size, first_column):
    """Write minus infinity where a tile's query does not see its entry yet.

    Parameters
    ----------
    tile : float32 (ROWS, WIDTH)
        Of the entries from ``first_slot`` on, and of the queries from ``first_column`` on.
    slots : int64 (n_tokens,)
        Slot of each token's own entry, the last that its ``group_size`` queries see; rising.
    """
    token = first_column // group_size
    for row in range(ROWS):
        while token < slots.shape[0] and slots[token] < first_slot + row:
            token += 1
        unseen = min(max(token * group_size - first_column, 0), WIDTH)
        for column in range(unseen):
            tile[row, column] = -np.inf
