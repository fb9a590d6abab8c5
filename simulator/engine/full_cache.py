"""What the full cache attends to: the part of a comparison that no policy changes, once per trace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from simulator.engine.sampling import EVERYTHING, Sample
from simulator.kernels.spans import strongest_keys
from traces.numbers import to_float32
from traces.trace import Trace

# Weights of one block of queries, float32: 16 MB.
_BLOCK_WEIGHTS = 2**22
# Weights kept for the oracle, float32: at most 128 MB, at least this many decode steps.
_ORACLE_ELEMENTS = 2**25
_ORACLE_STEPS = 8


def sampled_steps(n_steps: int, n_samples: int) -> np.ndarray:
    """Spread at most ``n_samples`` decode steps evenly, the last one included; int64, increasing."""
    n_samples = min(n_steps, n_samples)
    if not n_samples:
        return np.empty(0, np.int64)
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
    shape, scale = trace.shape, np.float32(trace.scale)
    stored = {name: trace.stored(layer, name) for name in ("queries", "keys", "lse")}
    n_at_once = max(1, _BLOCK_WEIGHTS // (shape.n_kv_heads * (int(positions[-1]) + 1)))
    for first in range(0, len(positions), n_at_once):
        own = positions[first : first + n_at_once]
        n_keys = int(own[-1]) + 1
        weights = np.empty((shape.n_kv_heads, len(own), n_keys), np.float32)
        for kv_head in range(shape.n_kv_heads):
            group = slice(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
            keys = to_float32(stored["keys"][kv_head, :n_keys], shape.dtype)
            queries = to_float32(stored["queries"][group, own], shape.dtype)
            logits = queries.reshape(-1, shape.head_dim) @ keys.T
            logits *= scale
            logits -= stored["lse"][group, own].reshape(-1, 1)
            # What lies in a query's future may overflow, and is cut off.
            with np.errstate(over="ignore"):
                np.exp(logits, out=logits)
                logits.reshape(shape.group_size, len(own), n_keys).mean(axis=0, out=weights[kv_head])
        for i, position in enumerate(own):
            yield weights[:, i, : position + 1]


class FullCache:
    """The strongest keys of every decode step, and the best any allocation could retain.

    Parameters
    ----------
    trace : Trace
    jobs : int
        Threads over KV heads.
    sample : Sample, optional
        What is measured; everything by default.
    oracle : bool
        Whether to keep the weights that the oracle needs.

    Attributes
    ----------
    sample : Sample
    strongest : int32 (n_layers, n_query_heads, n_steps)
        Position of the key with the largest weight, ties to the later one, of all layers, query heads and
        decode steps, or of those of ``sample``.
    largest : float32 (n_layers, n_query_heads, n_steps)
        That weight.
    oracle_at : int64 (n_oracle,)
        Where in the sampled steps the oracle is evaluated: at all of them unless the trace is very large, at
        none without ``oracle`` or if only some heads are measured.
    """

    def __init__(
        self, trace: Trace, jobs: int = 1, sample: Sample | None = None, *, oracle: bool = True
    ) -> None:
        shape = trace.shape
        self.sample = sample = sample or EVERYTHING.draw(trace, 0)
        self._prompt_tokens = trace.prompt_tokens
        self._n_heads = shape.n_layers * shape.n_kv_heads
        n_layers, n_kv_heads = sample.kv_heads.shape
        n_sampled = len(sample.steps)
        self.strongest = np.empty((n_layers, n_kv_heads * shape.group_size, n_sampled), np.int32)
        self.largest = np.empty(self.strongest.shape, np.float32)
        fitting = max(_ORACLE_STEPS, _ORACLE_ELEMENTS // (self._n_heads * trace.total_tokens))
        self.oracle_at = sampled_steps(n_sampled if oracle and sample.has_every_head else 0, fitting)
        sizes = (sample.steps[self.oracle_at] + trace.prompt_tokens + 1) * self._n_heads
        self._weights = [np.empty(size, np.float32) for size in sizes]
        with ThreadPoolExecutor(jobs) as pool:
            heads = [(row, at) for row in range(n_layers) for at in range(n_kv_heads)]
            list(pool.map(lambda where: self._find_strongest(trace, *where), heads))
            if len(self.oracle_at):
                list(pool.map(lambda layer: self._collect_weights(trace, layer), range(shape.n_layers)))
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
        float64 (n_oracle,)
        """
        counts = held[self.sample.steps[self.oracle_at]]
        return np.array(
            [
                weights[:count].sum(dtype=np.float64) / self._n_heads
                for weights, count in zip(self._weights, counts, strict=True)
            ]
        )

    def _find_strongest(self, trace: Trace, row: int, at: int) -> None:
        shape = trace.shape
        layer, kv_head = int(self.sample.layers[row]), int(self.sample.kv_heads[row, at])
        group = slice(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
        measured = slice(at * shape.group_size, (at + 1) * shape.group_size)
        tokens = self.sample.steps + self._prompt_tokens
        keys, queries, lse = (trace.stored(layer, name) for name in ("keys", "queries", "lse"))
        largest, self.strongest[row, measured] = strongest_keys(
            keys[kv_head], queries[group], tokens, dtype=shape.dtype
        )
        # Numbers that do not fit together may overflow; the row they make is refused.
        with np.errstate(over="ignore"):
            self.largest[row, measured] = np.exp(largest * np.float32(trace.scale) - lse[group, tokens])

    def _collect_weights(self, trace: Trace, layer: int) -> None:
        positions = self.sample.steps[self.oracle_at] + self._prompt_tokens
        n_kv_heads = trace.shape.n_kv_heads
        rows = group_weights(trace, layer, positions)
        for collected, position, weights in zip(self._weights, positions, rows, strict=True):
            size = n_kv_heads * (position + 1)
            collected[layer * size : (layer + 1) * size] = weights.reshape(-1)
