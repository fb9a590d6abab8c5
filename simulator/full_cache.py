"""What the full cache attends to: the part of a comparison that no policy changes, once per trace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from simulator.kernels import strongest_positions
from traces.numbers import to_float32
from traces.trace import Trace

# Products of one block, float32: 16 MB.
_BLOCK_ELEMENTS = 2**22
# Weights kept for the oracle, float32: at most 256 MB, at least this many decode steps.
_ORACLE_ELEMENTS = 2**26
_ORACLE_STEPS = 8


def sampled_steps(n_steps: int, n_samples: int) -> np.ndarray:
    """Spread at most ``n_samples`` decode steps evenly, the last one included; int64, increasing."""
    n_samples = min(n_steps, n_samples)
    return np.unique(np.round(np.linspace(n_steps / n_samples, n_steps, n_samples)).astype(int) - 1)


def group_weights(trace: Trace, layer: int, positions: np.ndarray) -> Iterator[np.ndarray]:
    """Yield full-cache attention weights, averaged over each GQA group, one query token after the other.

    Parameters
    ----------
    trace : Trace
    layer : int
    positions : int array
        Query tokens, increasing.

    Yields
    ------
    float32 (n_kv_heads, position + 1), rows summing to 1.
    """
    shape = trace.shape
    keys = trace.keys(layer, 0, int(positions[-1]) + 1)
    queries = to_float32(trace.stored(layer, "queries")[:, positions], shape.dtype)
    queries = queries.reshape(shape.n_kv_heads, shape.group_size, len(positions), shape.head_dim)
    lse = trace.stored(layer, "lse")[:, positions]
    lse = lse.reshape(shape.n_kv_heads, shape.group_size, len(positions), 1)
    for i, position in enumerate(positions):
        products = queries[:, :, i] @ keys[:, : position + 1].transpose(0, 2, 1)
        yield np.exp(products * np.float32(trace.scale) - lse[:, :, i]).mean(axis=1)


class FullCache:
    """The strongest keys of every decode step, and the best any allocation could retain.

    Parameters
    ----------
    trace : Trace
    jobs : int
        Threads over layers.

    Attributes
    ----------
    strongest : int32 (n_layers, n_query_heads, n_steps)
        Position of the key with the largest weight, ties to the later one.
    largest : float32 (n_layers, n_query_heads, n_steps)
        That weight.
    oracle_steps : int64 (n_sampled,)
        Decode steps at which the oracle is evaluated: all of them unless the trace is very large.
    """

    def __init__(self, trace: Trace, jobs: int = 1) -> None:
        shape, n_steps = trace.shape, trace.total_tokens - trace.prompt_tokens
        self._prompt_tokens = trace.prompt_tokens
        self._n_heads = shape.n_layers * shape.n_kv_heads
        self.strongest = np.empty((shape.n_layers, shape.n_query_heads, n_steps), np.int32)
        self.largest = np.empty(self.strongest.shape, np.float32)
        fitting = _ORACLE_ELEMENTS // (self._n_heads * trace.total_tokens)
        self.oracle_steps = sampled_steps(n_steps, max(_ORACLE_STEPS, fitting))
        sizes = (self.oracle_steps + trace.prompt_tokens + 1) * self._n_heads
        self._weights = [np.empty(size, np.float32) for size in sizes]

        def observe(layer: int) -> None:
            self._find_strongest(trace, layer)
            self._collect_weights(trace, layer)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(observe, range(shape.n_layers)))
        for weights in self._weights:
            weights[::-1].sort()

    def oracle_mass(self, held: np.ndarray) -> np.ndarray:
        """Give the largest mean mass that ``held`` entries can retain at each sampled step.

        At every step the best entries of all layers and KV heads are taken, with the attention of that
        step known beforehand and nothing lost to earlier evictions: an upper bound for every policy that
        holds as many entries.

        Parameters
        ----------
        held : int64 (n_steps,)
            Entries over all layers and KV heads at every decode step.

        Returns
        -------
        float64 (n_sampled,)
        """
        return np.array(
            [
                weights[:count].sum(dtype=np.float64) / self._n_heads
                for weights, count in zip(self._weights, held[self.oracle_steps], strict=True)
            ]
        )

    def _find_strongest(self, trace: Trace, layer: int) -> None:
        shape, first, last = trace.shape, trace.prompt_tokens, trace.total_tokens
        keys = trace.keys(layer, 0, last)
        lse, scale = trace.stored(layer, "lse"), np.float32(trace.scale)
        n_rows = max(1, _BLOCK_ELEMENTS // (shape.group_size * last))
        for start in range(first, last, n_rows):
            stop = min(start + n_rows, last)
            queries = trace.queries(layer, start, stop)
            n_visible = np.tile(np.arange(start + 1, stop + 1), shape.group_size)
            for kv_head in range(shape.n_kv_heads):
                group = slice(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
                products = queries[group].reshape(-1, shape.head_dim) @ keys[kv_head, :stop].T
                found = np.empty(len(products), np.int32)
                strongest_positions(products, n_visible, found)
                where = slice(start - first, stop - first)
                self.strongest[layer, group, where] = found.reshape(shape.group_size, -1)
                logits = products[np.arange(len(products)), found].reshape(shape.group_size, -1) * scale
                self.largest[layer, group, where] = np.exp(logits - lse[group, start:stop])

    def _collect_weights(self, trace: Trace, layer: int) -> None:
        positions = self.oracle_steps + self._prompt_tokens
        n_kv_heads = trace.shape.n_kv_heads
        rows = group_weights(trace, layer, positions)
        for collected, position, weights in zip(self._weights, positions, rows, strict=True):
            size = n_kv_heads * (position + 1)
            collected[layer * size : (layer + 1) * size] = weights.reshape(-1)
