"""How memory and mass went on over time: the decode steps between two compressions, span by span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simulator.engine.request import Outcome
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The decode steps of one layer that end with a compression, or with the last token.

    Attributes
    ----------
    layer : int
    compression : int or None
        The compression that ends it; None for the last span.
    n_tokens : int
        Tokens in the history at its end.
    n_steps : int
        Its decode steps; 0 where the prompt is compressed.
    budgets : int64 (n_kv_heads,) or None
        Budgets in force at that compression; for the last span those of the one before, None if there was
        none.
    lengths : int64 (n_kv_heads,)
        Entries held at its end, after the compression.
    mass : float64 (n_kv_heads,) or None
        Mean retained mass of each KV head's query heads over its steps; None without a step.
    """

    layer: int
    compression: int | None
    n_tokens: int
    n_steps: int
    budgets: np.ndarray | None
    lengths: np.ndarray
    mass: np.ndarray | None


def spans(trace: Trace, outcome: Outcome) -> list[Span]:
    """Cut every layer's decode at its compressions; by layer, then in time."""
    return [span for layer in range(trace.shape.n_layers) for span in _spans_of_layer(trace, outcome, layer)]


def _spans_of_layer(trace: Trace, outcome: Outcome, layer: int) -> Iterator[Span]:
    shape = trace.shape
    mass = outcome.mass[layer].reshape(shape.n_kv_heads, shape.group_size, -1).mean(1, dtype=np.float64)
    start, budgets = trace.prompt_tokens, None
    lengths = np.full(shape.n_kv_heads, start)

    def mean_until(stop: int) -> np.ndarray | None:
        steps = slice(start - trace.prompt_tokens, stop - trace.prompt_tokens)
        return mass[:, steps].mean(axis=1) if stop > start else None

    for division in (own for own in outcome.divisions if own.layer == layer):
        stop, budgets, lengths = division.n_tokens, division.budgets, division.lengths
        yield Span(layer, division.compression, stop, stop - start, budgets, lengths, mean_until(stop))
        start = stop
    stop = trace.total_tokens
    yield Span(layer, None, stop, stop - start, budgets, lengths + stop - start, mean_until(stop))
