"""Matrix products from within compiled loops, so that one call measures a span of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic

from simulator.kernels import VECTORISE, add_attention_mass, exp, max_pool, mean_weights, merge_logits

# How numbers are stored; see ``traces.numbers``.
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
_INT, _FLOAT, _BYTE = ir.IntType(32), ir.FloatType(), ir.IntType(8)


@cache
def has_sgemm() -> bool:
    """Say whether there is a BLAS for compiled loops; a machine that only decodes may lack SciPy."""
    return find_spec("scipy") is not None


@cache
def sgemm_address() -> int:
    """Give where the BLAS of SciPy keeps its ``sgemm``, for ``measure_heads``."""
    return get_cython_function_address("scipy.linalg.cython_blas", "sgemm")


def addresses(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Give where arrays begin, int64 (n,); they have to be kept while those are used."""
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)


@intrinsic
def _multiply(typing_context, sgemm, n_rows, n_columns, width, keys, queries, products):
    """Write ``products = keys @ queries.T``, all three row by row.

    ``sgemm`` and ``keys`` are addresses, since functions and lists of arrays would have to be compiled for
    anew; ``queries`` float32 (n_columns, width) and ``products`` float32 (n_rows, n_columns) are arrays.
    """
    signature = types.void(*(types.int64,) * 5, queries, products)

    def generate(context, builder, signature, arguments):
        sgemm, n_rows, n_columns, width, keys, queries, products = arguments

        def place(value):
            held = cgutils.alloca_once(builder, value.type)
            builder.store(value, held)
            return held

        rows, columns, depth = (place(builder.trunc(n, _INT)) for n in (n_rows, n_columns, width))
        one, zero = (place(ir.Constant(_FLOAT, value)) for value in (1.0, 0.0))
        transposed, plain = (place(ir.Constant(_BYTE, ord(letter))) for letter in "TN")
        rows_at = builder.inttoptr(keys, _FLOAT.as_pointer())
        columns_at, products_at = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(signature.args[5:], (queries, products), strict=True)
        )
        # BLAS reads arrays column by column, so that this is the product of the transposed.
        given = [transposed, plain, columns, rows, depth, one, columns_at, depth, rows_at, depth, zero]
        given += [products_at, columns]
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in given])
        builder.call(builder.inttoptr(sgemm, kind.as_pointer()), given)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _pointer(typing_context, address, like):
    """Give an address as a pointer to numbers of the type of ``like``."""
    signature = types.CPointer(like)(address, like)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@njit(nogil=True, cache=True)
def _widen(address, kind, numbers):
    """Write stored numbers, of a kind of ``KINDS``, as float32."""
    n = numbers.shape[0]
    if kind == 0:
        numbers[:] = carray(_pointer(address, np.float32(0)), (n,))
        return
    bits = carray(_pointer(address, np.uint16(0)), (n,))
    if kind == 2:
        # The bits of a bfloat16 are the upper half of a float32's.
        for i in range(n):
            numbers[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)
        return
    factor = np.float32(2.0**112)
    for i in range(n):
        size = np.uint32(np.uint32(bits[i] & np.uint16(0x7FFF)) << np.uint32(13))
        # Shifted, the bits are those of a float32 whose exponent is 112 too small, also of subnormal numbers.
        found = np.float32(np.uint32(size).view(np.float32) * factor).view(np.uint32)
        # What is infinite or not a number has an exponent of its own.
        found = np.uint32(size | np.uint32(0x7F800000)) if size >= np.uint32(0x0F800000) else found
        sign = np.uint32(np.uint32(bits[i] & np.uint16(0x8000)) << np.uint32(16))
        numbers[i] = np.uint32(found | sign).view(np.float32)


@njit(nogil=True, cache=True)
def measure_heads(sgemm, keys, own, queries, strides, kind, head_dim, lse, scale, n_at_once, room, mass):
    """Write the full-cache attention mass that a span's queries find in what their KV heads hold.

    Parameters
    ----------
    sgemm : int
        ``sgemm_address()``.
    keys : int64 (n_kv_heads,)
        Addresses of each head's keys, float32 (n_entries, head_dim), row by row.
    own : int64 (n_kv_heads, n_tokens)
        Slot of each token's own entry, the last that its queries see; rising.
    queries : int
        Address of what is stored of them, (n_kv_heads, group_size, n_tokens, head_dim); the numbers of one
        stand side by side.
    strides : int64 (3,)
        Bytes from one KV head, member of its group, and token to the next.
    kind : int
        Of ``KINDS``.
    head_dim : int
    lse : float32 (n_kv_heads, group_size, n_tokens)
        Log-sum-exp of each query over the full causal cache.
    scale : float32
    n_at_once : int
        Tokens whose products are held at once.
    room : float32 (n,)
        ``n_at_once * group_size`` numbers for each dimension and for each of the most entries seen.
    mass : float32 (n_kv_heads, group_size, n_tokens)
        Written.
    """
    n_kv_heads, group_size, n_tokens = lse.shape
    most = n_at_once * group_size
    sums, found = np.empty(most, np.float32), np.empty(most, np.float32)
    for kv_head in range(n_kv_heads):
        slots = own[kv_head]
        for first in range(0, n_tokens, n_at_once):
            last = min(first + n_at_once, n_tokens)
            n_seen, n_queries = slots[last - 1] + 1, (last - first) * group_size
            # Queries by token, so that those of a few tokens stand together.
            asked = room[: n_queries * head_dim].reshape(n_queries, head_dim)
            row = 0
            for token in range(first, last):
                for member in range(group_size):
                    offset = kv_head * strides[0] + member * strides[1] + token * strides[2]
                    _widen(queries + offset, kind, asked[row])
                    sums[row] = lse[kv_head, member, token]
                    row += 1
            block = room[n_queries * head_dim : n_queries * (head_dim + n_seen)].reshape(n_seen, n_queries)
            _multiply(sgemm, n_seen, n_queries, head_dim, keys[kv_head], asked, block)
            seen_from = np.empty(n_seen - slots[first], np.int64)
            token = first
            for slot in range(slots[first], n_seen):
                # The first token that sees a slot is the first whose own is no earlier.
                while slots[token] < slot:
                    token += 1
                seen_from[slot - slots[first]] = (token - first) * group_size
            add_attention_mass(block, scale, sums[:n_queries], seen_from, found[:n_queries])
            row = 0
            for token in range(first, last):
                for member in range(group_size):
                    mass[kv_head, member, token] = found[row]
                    row += 1


@njit(nogil=True, cache=True, fastmath=VECTORISE)
def _exponentials(logits):
    for i in range(logits.shape[0]):
        logits[i] = exp(logits[i])


@njit(nogil=True, cache=True)
def pool_window_attention(
    sgemm, keys, n_candidates, queries, group_size, n_queries, head_dim, scale, kernel_size, room, scores
):
    """Write the window's mean attention to the candidates of every KV head, pooled over their neighbours.

    Parameters
    ----------
    sgemm : int
        ``sgemm_address()``.
    keys : int64 (n_kv_heads,)
        Addresses of each head's keys, float32 (n_entries, head_dim), row by row.
    n_candidates : int64 (n_kv_heads,)
        Leading entries that are judged.
    queries : int64 (n_kv_heads,)
        Addresses of the window's queries, float32 (group_size, n_queries, head_dim), row by row.
    group_size, n_queries, head_dim : int
    scale : float32
    kernel_size : int
    room : float32 (n,)
        ``(group_size + 1) * n_queries + 1`` numbers for each of the most candidates.
    scores : float32 (n_kv_heads, n_most)
        Written for candidates.
    """
    n_columns = group_size * n_queries
    for kv_head in range(keys.shape[0]):
        n = n_candidates[kv_head]
        if n <= 0:
            continue
        products = room[: n * n_columns].reshape(n, n_columns)
        asked = carray(_pointer(queries[kv_head], np.float32(0)), (n_columns, head_dim))
        _multiply(sgemm, n, n_columns, head_dim, keys[kv_head], asked, products)
        rest = room[n * n_columns :]
        weights = rest[: n * n_queries].reshape(n_queries, n)
        # The row maximum is taken off first: logits reach 100 and float32 exp overflows at 88.
        merge_logits(products, scale, group_size, weights)
        _exponentials(rest[: n * n_queries])
        means = rest[n * n_queries : n * (n_queries + 1)]
        mean_weights(weights, 1, means)
        max_pool(means, kernel_size, scores[kv_head, :n])
