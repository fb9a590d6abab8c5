"""Dot products of a few keys with a few queries, formed in registers, to be summed or compared at once.

A matrix product of the whole would write all products to memory first. A product here is one sum over the
dimensions in one order, whatever stands beside it, so that it is the same in every place it is needed.

Some processors multiply and add two bfloat16 numbers at once, the second of them first. Such products are
exact in float32, so that sums in that order have the same bits without such an instruction, and of the same
numbers as float32. There is one difference: with it, a number or a sum below 1.2e-38 counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from simulator.kernels.compiled import compiled
from simulator.kernels.cpu import cpu_features, is_arm, multiplies_pairs
from simulator.kernels.widening import KINDS, floats_at, widen_rows


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

# Whether the processor multiplies pairs of bfloat16 numbers.
HAS_PAIRS = multiplies_pairs()


class Form(NamedTuple):
    """How stored keys and queries enter products.

    Attributes
    ----------
    kind : int
        What to read them as, of ``widening.KINDS``: pairs are copied as if they were float32.
    depth : int
        Numbers of a key, each as wide as a float32: a pair of bfloat16 numbers counts as one.
    paired : bool
        Whether they are such pairs, for ``multiply_pairs``; else they are made float32.
    """

    kind: int
    depth: int
    paired: bool


@register_jitable
def can_pair(head_dim):
    """Say whether keys of ``head_dim`` bfloat16 numbers can be multiplied in pairs."""
    return HAS_PAIRS and head_dim % 2 == 0


def form_of(dtype: str, head_dim: int) -> Form:
    """Say how numbers stored in ``dtype`` enter products."""
    if dtype == "bfloat16" and can_pair(head_dim):
        return Form(KINDS["float32"], head_dim // 2, True)
    return Form(KINDS[dtype], head_dim, False)


_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, _LANES)


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _vector_at(builder: ir.IRBuilder, numbers: Any, offset: Any) -> Any:
    return builder.bitcast(builder.gep(numbers, [offset]), _VECTOR.as_pointer())


def _floats(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.inttoptr(address, _FLOAT.as_pointer())


def _load(builder: ir.IRBuilder, place: Any) -> Any:
    loaded = builder.load(place)
    loaded.align = 2  # a pair may begin wherever a number of 2 bytes does
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


def _write_tile(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any, sum_up: Callable) -> Any:
    """Write a tile of products; ``sum_up`` calls its ``add`` for every number of a key, in order."""
    keys, n_rows, panel, tile = arguments
    panel, depth, _ = _numbers_of(context, builder, signature.args[2], panel)
    tile, _, stride = _numbers_of(context, builder, signature.args[3], tile)
    first = _floats(builder, keys)
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

    def add(number: Any, combine: Callable) -> None:
        start = builder.mul(number, _index(WIDTH))
        queries = [
            _load(builder, _vector_at(builder, panel, builder.add(start, _index(i * _LANES))))
            for i in range(_VECTORS)
        ]
        for row, own in zip(rows, sums, strict=True):
            key = _repeat(builder, _load(builder, builder.gep(row, [number])))
            for query, place in zip(queries, own, strict=True):
                builder.store(combine(key, query, builder.load(place)), place)

    sum_up(depth, add)
    for row, own in enumerate(sums):
        for i, place in enumerate(own):
            at = builder.add(builder.mul(_index(row), stride), _index(i * _LANES))
            _store(builder, builder.load(place), _vector_at(builder, tile, at))
    return context.get_dummy_value()


@intrinsic
def multiply_tile(typing_context: Any, keys: Any, n_rows: Any, panel: Any, tile: Any) -> tuple[Any, Callable]:
    """Write ``tile = keys @ panel``; from row ``n_rows`` on it repeats the last key's.

    ``keys`` is the address of ``n_rows`` keys, 1 to ``ROWS``, float32, row by row; ``panel`` float32
    (head_dim, WIDTH); ``tile`` float32 (ROWS, WIDTH), whose rows are each without gaps, is written.
    """
    signature = types.void(types.int64, types.int64, panel, tile)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fmuladd = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_LANES}f32")

        def combine(*vectors: Any) -> Any:
            return builder.call(fmuladd, vectors)

        def sum_up(depth: Any, add: Callable) -> None:
            # The second of two numbers comes first, as in `multiply_pairs`.
            with cgutils.for_range(builder, builder.lshr(depth, _index(1))) as loop:
                even = builder.shl(loop.index, _index(1))
                add(builder.add(even, _index(1)), combine)
                add(even, combine)
            with builder.if_then(builder.trunc(depth, ir.IntType(1)), likely=False):
                add(builder.sub(depth, _index(1)), combine)

        return _write_tile(context, builder, signature, arguments, sum_up)

    return signature, generate


class _BFloat(ir.Type):
    """What LLVM calls bfloat and llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def _multiply_pairs(
    typing_context: Any, keys: Any, n_rows: Any, panel: Any, tile: Any
) -> tuple[Any, Callable]:
    """Do what ``multiply_tile`` does with pairs of bfloat16 numbers, each as wide as a float32."""
    signature = types.void(types.int64, types.int64, panel, tile)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pairs = ir.VectorType(_BFloat(), 2 * _LANES)
        kind = ir.FunctionType(_VECTOR, [_VECTOR, pairs, pairs])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * _LANES}"
        dot = cgutils.get_or_insert_function(builder.module, kind, name)

        def combine(key: Any, query: Any, total: Any) -> Any:
            return builder.call(dot, [total, builder.bitcast(key, pairs), builder.bitcast(query, pairs)])

        def sum_up(depth: Any, add: Callable) -> None:
            with cgutils.for_range(builder, depth) as loop:
                add(loop.index, combine)

        return _write_tile(context, builder, signature, arguments, sum_up)

    return signature, generate


# Never called where there is no instruction for it.
multiply_pairs = _multiply_pairs if HAS_PAIRS else multiply_tile


@njit(inline="always")
def multiply(paired, keys, n_rows, panel, tile):
    """Do ``multiply_pairs`` or ``multiply_tile``."""
    if paired:
        multiply_pairs(keys, n_rows, panel, tile)
    else:
        multiply_tile(keys, n_rows, panel, tile)


@intrinsic
def _transpose(typing_context: Any, rows: Any, first: Any, number: Any, turned: Any) -> tuple[Any, Callable]:
    """Write ``turned = block.T``, float32 (_LANES, _LANES), whose rows are each without gaps.

    The rows of ``block`` are at the addresses ``rows[first:]``, from their ``number`` on.
    """
    signature = types.void(rows, types.int64, types.int64, turned)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        places, first, number, turned = arguments
        places = context.make_array(signature.args[0])(context, builder, places).data
        turned, _, stride = _numbers_of(context, builder, signature.args[3], turned)
        vectors = []
        for row in range(_LANES):
            at = builder.load(builder.gep(places, [builder.add(first, _index(row))]))
            vectors.append(_load(builder, _vector_at(builder, _floats(builder, at), number)))
        # Blocks of 1, 2, 4, ... numbers change places across the diagonal.
        size = 1
        while size < _LANES:
            is_left = [lane & size == 0 for lane in range(_LANES)]
            upper = [lane if left else _LANES + lane - size for lane, left in enumerate(is_left)]
            lower = [lane + size if left else _LANES + lane for lane, left in enumerate(is_left)]
            masks = [ir.Constant(ir.VectorType(_INT32, _LANES), lanes) for lanes in (upper, lower)]
            for row in range(_LANES):
                if not row & size:
                    pair = vectors[row], vectors[row + size]
                    vectors[row], vectors[row + size] = (
                        builder.shuffle_vector(*pair, mask) for mask in masks
                    )
            size *= 2
        for row, vector in enumerate(vectors):
            at = builder.mul(_index(row), stride)
            _store(builder, vector, _vector_at(builder, turned, at))
        return context.get_dummy_value()

    return signature, generate


@compiled(nogil=True)
def fill_panel(rows, panel):
    """Write the queries at the addresses ``rows``, int64 (WIDTH,), as columns of ``panel``, (depth, WIDTH).

    A query is ``depth`` float32 numbers, or pairs that are as wide.
    """
    depth = panel.shape[0]
    n_whole = depth // _LANES * _LANES
    for d in range(0, n_whole, _LANES):
        for first in range(0, WIDTH, _LANES):
            _transpose(rows, first, d, panel[d : d + _LANES, first : first + _LANES])
    if n_whole < depth:
        for query in range(WIDTH):
            numbers = carray(floats_at(rows[query]), (depth,))
            for d in range(n_whole, depth):
                panel[d, query] = numbers[d]


@register_jitable
def n_panels(n_queries):
    """Count the panels that queries fill."""
    return -(-n_queries // WIDTH)


@compiled(nogil=True)
def fill_panels(queries, strides, kind, group_size, n_tokens, panels):
    """Turn stored queries of a KV head, those of a token side by side, into panels; the rest is zero."""
    n_queries, depth = n_tokens * group_size, panels.shape[1]
    # Those that are to be widened first, and at the end a query of zeros.
    flat = np.zeros((WIDTH + 1) * depth, np.float32)
    nothing = np.int64(flat.ctypes.data) + 4 * WIDTH * depth
    rows = np.empty(WIDTH, np.int64)
    for panel in range(panels.shape[0]):
        first = panel * WIDTH
        for column in range(WIDTH):
            token, member = divmod(first + column, group_size)
            rows[column] = nothing
            if first + column < n_queries:
                rows[column] = queries + member * strides[1] + token * strides[2]
        if kind != 0:
            for member in range(group_size):
                # Its queries within the panel, one in every ``group_size``.
                start = max(-(-(first - member) // group_size), 0)
                stop = min(-(-(first + WIDTH - member) // group_size), n_tokens)
                at, target = member * strides[1] + start * strides[2], start * group_size + member - first
                step = group_size * depth
                widen_rows(queries + at, strides[2], kind, stop - start, depth, flat, target * depth, step)
            for column in range(min(n_queries - first, WIDTH)):
                rows[column] = np.int64(flat.ctypes.data) + 4 * column * depth
        fill_panel(rows, panels[panel])
    flat[0] = 0  # it has to live until here: rows are read by address


@njit(inline="always")
def hide_unseen(tile, first_slot, slots, group_size, first_column):
    """Write minus infinity where a tile's query does not see its entry yet.

    Parameters
    ----------
    tile : float32 (ROWS, WIDTH)
    first_slot : int
        Of the tile's entries.
    slots : int64 (n_tokens,)
        Slot of each token's own entry, the last that its ``group_size`` queries see; rising.
    group_size : int
    first_column : int
        Of the tile's queries.
    """
    token = first_column // group_size
    for row in range(ROWS):
        while token < slots.shape[0] and slots[token] < first_slot + row:
            token += 1
        unseen = min(max(token * group_size - first_column, 0), WIDTH)
        for column in range(unseen):
            tile[row, column] = -np.inf
