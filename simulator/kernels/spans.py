"""What a span's queries find in a layer's KV heads: attention mass, strongest keys, products for a scorer."""

from __future__ import annotations

import numpy as np
from numba import njit

from simulator.kernels.attention import add_tile_mass, raise_strongest
from simulator.kernels.compiled import compiled
from simulator.kernels.scratch import scratch
from simulator.kernels.tiles import ROWS, WIDTH, fill_panels, form_of, hide_unseen, multiply, n_panels
from simulator.kernels.widening import address_of, widen

# Tokens whose queries are read at once; bounds the memory of long spans.
_BLOCK_TOKENS = 512
_NO_PRODUCTS = np.empty((0, 0, 0), np.float32)
# Keys that all queries of a span meet before the next ones: they stay in the cache meanwhile.
_BLOCK_KEYS = 40 * ROWS


class WindowProducts:
    """Dot products of a span's last queries with all keys held, to be known until entries come or go.

    Parameters
    ----------
    n_kv_heads : int
    n_columns : int
        Queries that are kept of each KV head: by token and then member of the group.
    """

    def __init__(self, n_kv_heads: int, n_columns: int) -> None:
        self._room = np.empty((n_kv_heads, 0, n_columns), np.float32)
        self._is_known = False

    def known(self, lengths: np.ndarray) -> list[np.ndarray] | None:
        """Give each KV head's products, float32 (length, n_columns), or None if they are not known.

        Those with entries that not all of the queries see are of no meaning. The next span writes over them.
        """
        return [own[:n] for own, n in zip(self._room, lengths, strict=True)] if self._is_known else None

    def forget(self) -> None:
        """Know them no more: the keys have changed."""
        self._is_known = False

    def release(self) -> None:
        """Forget them and give their memory back."""
        self._room, self._is_known = self._room[:, :0].copy(), False

    def _written(self, n_most: int) -> np.ndarray:
        """Give an array to write them to, with room for as many entries."""
        n_kv_heads, n_room, n_columns = self._room.shape
        if n_room < n_most:
            self._room = np.empty((n_kv_heads, n_most + n_most // 4, n_columns), np.float32)
        self._is_known = True
        return self._room


def span_mass(
    keys: np.ndarray,
    kv_heads: slice | list[int],
    slots: np.ndarray,
    queries: np.ndarray,
    lse: np.ndarray,
    *,
    dtype: str,
    scale: float,
    products: WindowProducts | None = None,
) -> np.ndarray:
    """Give the full-cache attention mass that a span's queries find in what their KV heads hold.

    Parameters
    ----------
    keys : float32 (n_all_kv_heads, capacity, width)
        ``simulator.kernels.ledger.Ledger.multiplied`` of a layer.
    kv_heads : slice or list of int
        The ``n_kv_heads`` that are measured.
    slots : int64 (n_kv_heads, n_tokens)
        Slot of each token's own entry, the last that its queries see; rising.
    queries : (n_kv_heads, group_size, n_tokens, head_dim)
        As stored in ``dtype``; the numbers of one stand side by side.
    lse : float32 (n_kv_heads, group_size, n_tokens)
        Log-sum-exp of each query over the full causal cache.
    dtype : str
    scale : float
        Attention scale.
    products : WindowProducts, optional
        Told those of the last queries; only if all KV heads are measured.

    Returns
    -------
    float32 (n_kv_heads, group_size, n_tokens)
    """
    form = form_of(dtype, queries.shape[-1])
    mass = np.empty(lse.shape, np.float32)
    measure_heads(
        (address_of(keys) + keys.strides[0] * np.arange(len(keys)))[kv_heads],
        slots,
        address_of(queries),
        np.array(queries.strides[:3]),
        form,
        lse,
        np.float32(scale),
        scratch(n_panels(lse[0].size) * WIDTH, form.depth).reshape(-1),
        _NO_PRODUCTS if products is None else products._written(int(slots[:, -1].max()) + 1),
        mass,
    )
    return mass


def strongest_keys(
    keys: np.ndarray, queries: np.ndarray, tokens: np.ndarray, *, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Find the key of a KV head with which each query has its largest product, of those not in its future.

    Parameters
    ----------
    keys : (n_tokens, head_dim)
        Of all tokens, as stored in ``dtype``.
    queries : (group_size, n_tokens, head_dim)
        As ``keys``; the numbers of one stand side by side.
    tokens : int64 (n,)
        Tokens whose queries are asked about, rising.
    dtype : str

    Returns
    -------
    largest : float32 (group_size, n)
        The product.
    strongest : int32 (group_size, n)
        The key's token; of equal ones the last.
    """
    form = form_of(dtype, keys.shape[1])
    keys = np.ascontiguousarray(keys) if form.paired else widen(keys[None], dtype)[0]
    shape = len(queries), len(tokens)
    largest, strongest = np.empty(shape, np.float32), np.empty(shape, np.int32)
    for first in range(0, len(tokens), _BLOCK_TOKENS):
        block = slice(first, first + _BLOCK_TOKENS)
        own = tokens[block]
        # A slice where it is one: no copy of what is mapped.
        is_run = own[-1] - own[0] == len(own) - 1
        asked = queries[:, slice(own[0], own[-1] + 1) if is_run else own]
        found = np.empty(asked.shape[:2], np.float32), np.empty(asked.shape[:2], np.int32)
        find_strongest(
            address_of(keys),
            own,
            address_of(asked),
            np.array([0, *asked.strides[:2]]),
            form,
            scratch(n_panels(found[0].size) * WIDTH, form.depth).reshape(-1),
            *found,
        )
        largest[:, block], strongest[:, block] = found
    return largest, strongest


@njit(inline="always")
def _reach(slots, group_size, first):
    """Count the entries that all queries of the panel from ``first`` on see, and those that any sees."""
    last_token = min((first + WIDTH - 1) // group_size, slots.shape[0] - 1)
    return slots[first // group_size] + 1, slots[last_token] + 1


@compiled(nogil=True)
def measure_heads(keys, own, queries, strides, form, lse, scale, room, products, mass):
    """Write what ``span_mass`` gives to ``mass``; parameters are as there, except for these.

    ``keys``, int64 (n_kv_heads,), are addresses of the measured heads' keys, row by row in ``form``; ``own``
    is called ``slots`` there. ``queries`` is the address of what is stored of them, and ``strides``, int64
    (3,), are the bytes from one KV head, member of its group, and token to the next. ``room`` has
    ``n_panels(group_size * n_tokens) * WIDTH * form.depth`` numbers. ``products``, float32 (n_kv_heads,
    n_most, n_kept), is written with those of the last queries, by token and then member, and the entries that
    all of these see.
    """
    n_kv_heads, group_size, n_tokens = lse.shape
    kind, depth, paired = form
    n_used = n_panels(n_tokens * group_size)
    first_kept = n_tokens * group_size - products.shape[2]
    panels = room[: n_used * depth * WIDTH].reshape(n_used, depth, WIDTH)
    shifts, sums = np.zeros((n_used, WIDTH), np.float32), np.empty((n_used, WIDTH), np.float32)
    tile = np.empty((ROWS, WIDTH), np.float32)
    for kv_head in range(n_kv_heads):
        slots = own[kv_head]
        fill_panels(queries + kv_head * strides[0], strides, kind, group_size, n_tokens, panels)
        for token in range(n_tokens):
            for member in range(group_size):
                query = token * group_size + member
                shifts[query // WIDTH, query % WIDTH] = lse[kv_head, member, token]
        sums[:] = 0
        for block in range(0, slots[n_tokens - 1] + 1, _BLOCK_KEYS):
            for panel in range(n_used):
                first = panel * WIDTH
                seen_by_all, n_seen = _reach(slots, group_size, first)
                stop = min(block + _BLOCK_KEYS, n_seen)
                asked, shift, found = panels[panel], shifts[panel], sums[panel]
                for slot in range(block, stop, ROWS):
                    at = keys[kv_head] + 4 * depth * slot
                    multiply(paired, at, min(ROWS, stop - slot), asked, tile)
                    if first + WIDTH > first_kept:
                        _keep(tile, slot, stop, first, first_kept, products, kv_head)
                    if slot + ROWS > seen_by_all:
                        hide_unseen(tile, slot, slots, group_size, first)
                    add_tile_mass(tile, scale, shift, found)
        for token in range(n_tokens):
            for member in range(group_size):
                query = token * group_size + member
                mass[kv_head, member, token] = sums[query // WIDTH, query % WIDTH]


@njit(inline="always")
def _keep(tile, slot, stop, first, first_kept, products, kv_head):
    """Write a tile, of the entries from ``slot`` and the queries from ``first`` on, to where it is kept."""
    start = max(first_kept - first, 0)
    end = min(first_kept + products.shape[2] - first, WIDTH)
    at = first - first_kept
    for row in range(min(ROWS, stop - slot)):
        if start == 0 and end == WIDTH:
            # As wide as the tile, which vectorises.
            for column in range(WIDTH):
                products[kv_head, slot + row, at + column] = tile[row, column]
        else:
            for column in range(start, end):
                products[kv_head, slot + row, at + column] = tile[row, column]


@compiled(nogil=True)
def find_strongest(keys, slots, queries, strides, form, room, largest, strongest):
    """Write what ``strongest_keys`` gives, of queries that are not spread out.

    ``keys`` is the address of the KV head's keys, ``slots`` are the tokens. ``queries``, ``strides``,
    ``form`` and ``room`` are as of ``measure_heads``, but the first of the strides is of no meaning.
    """
    group_size, n_tokens = largest.shape
    kind, depth, paired = form
    n_used = n_panels(n_tokens * group_size)
    panels = room[: n_used * depth * WIDTH].reshape(n_used, depth, WIDTH)
    fill_panels(queries, strides, kind, group_size, n_tokens, panels)
    best, where = np.full((n_used, WIDTH), -np.inf, np.float32), np.zeros((n_used, WIDTH), np.int32)
    tile = np.empty((ROWS, WIDTH), np.float32)
    for block in range(0, slots[n_tokens - 1] + 1, _BLOCK_KEYS):
        for panel in range(n_used):
            first = panel * WIDTH
            seen_by_all, n_seen = _reach(slots, group_size, first)
            stop = min(block + _BLOCK_KEYS, n_seen)
            asked, most, found = panels[panel], best[panel], where[panel]
            for slot in range(block, stop, ROWS):
                multiply(paired, keys + 4 * depth * slot, min(ROWS, stop - slot), asked, tile)
                if slot + ROWS > seen_by_all:
                    hide_unseen(tile, slot, slots, group_size, first)
                raise_strongest(tile, slot, most, found)
    for token in range(n_tokens):
        for member in range(group_size):
            query = token * group_size + member
            largest[member, token] = best[query // WIDTH, query % WIDTH]
            strongest[member, token] = where[query // WIDTH, query % WIDTH]
