"""How far evictions move what the model predicts, to first order, where a trace holds sensitivities.

What a query head gives under a policy differs from what the full cache gives; times the sensitivity of the
predictions, summed over heads and layers, it is how much the log-probability of a drawn token moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulator.engine.sampling import Sample
from simulator.kernels.products import products
from simulator.kernels.widening import widen
from traces.manifest import sensitivity_dtype
from traces.numbers import to_float32
from traces.trace import Trace

# Weights of one block of queries, float32: 16 MB.
_BLOCK_WEIGHTS = 2**22


def head_outputs(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: np.ndarray, scale: float
) -> np.ndarray:
    """Attend from a group of query heads to what their KV head holds.

    Parameters
    ----------
    queries : float32 (group_size, n_tokens, head_dim)
    keys, values : float32 (n_entries, head_dim)
    seen : int (n_tokens,)
        How many of them, from the first, each token's queries see; at least 1.
    scale : float

    Returns
    -------
    float32 (group_size, n_tokens, head_dim)
    """
    group_size, n_tokens, head_dim = queries.shape
    logits = (queries.reshape(-1, head_dim) @ keys.T).reshape(group_size, n_tokens, -1)
    logits *= np.float32(scale)
    first_unseen = int(seen.min())
    unseen = np.arange(first_unseen, len(keys)) >= seen[:, None]
    logits[:, :, first_unseen:][:, unseen] = -np.inf
    logits -= logits.max(axis=2, keepdims=True)
    weights = np.exp(logits, out=logits)
    outputs = (weights.reshape(-1, len(keys)) @ values).reshape(queries.shape)
    outputs /= weights.sum(axis=2, keepdims=True)
    return outputs


class Sensitivities:
    """A trace's sensitivities at the sampled steps, with what the full cache's heads give; once per trace.

    Parameters
    ----------
    trace : Trace
        With values and sensitivities.
    sample : Sample
        Of all heads.
    """

    def __init__(self, trace: Trace, sample: Sample) -> None:
        self._trace, self._steps = trace, sample.steps
        self.n_draws = trace.manifest.n_draws
        self._dtype = sensitivity_dtype(trace.shape.dtype)
        # Looked up once: there are many short spans.
        self._stored = [np.asarray(trace.stored_sensitivity(layer)) for layer in range(trace.shape.n_layers)]
        self._full = [np.stack(list(self._of_layer(layer))) for layer in range(trace.shape.n_layers)]

    @property
    def n_bytes(self) -> int:
        """Memory that is kept; what is stored is mapped."""
        return sum(own.nbytes for own in self._full)

    def change(self, layer: int, kv_head: int, sampled: slice, outputs: np.ndarray) -> np.ndarray:
        """Tell how much log-probabilities of draws change if a KV head's queries get ``outputs``.

        Parameters
        ----------
        layer, kv_head : int
        sampled : slice
            Of the sampled steps.
        outputs : float32 (group_size, n_tokens, head_dim)
            At those steps.

        Returns
        -------
        float32 (n_draws, n_tokens)
        """
        own = self._of_head(layer, kv_head, self._steps[sampled])
        return products(own, self._dtype, outputs) - self._full[layer][kv_head, :, sampled]

    def _of_head(self, layer: int, kv_head: int, steps: np.ndarray) -> np.ndarray:
        """Give the sensitivities of a group as they are stored; (n_draws, group_size, n_steps, head_dim)."""
        size = self._trace.shape.group_size
        stored = self._stored[layer][:, kv_head * size : (kv_head + 1) * size]
        is_run = len(steps) == steps[-1] - steps[0] + 1
        return stored[:, :, steps[0] : steps[-1] + 1] if is_run else stored[:, :, steps]

    def _of_layer(self, layer: int) -> Iterator[np.ndarray]:
        """Yield for every KV head what the full cache gives, times sensitivity; (n_draws, n_sampled)."""
        trace, shape = self._trace, self._trace.shape
        keys, values = (widen(trace.stored(layer, name), shape.dtype) for name in ("keys", "values"))
        tokens = self._steps + trace.prompt_tokens
        n_at_once = max(1, _BLOCK_WEIGHTS // (shape.group_size * trace.total_tokens))
        for kv_head in range(shape.n_kv_heads):
            group = slice(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
            found = []
            for first in range(0, len(tokens), n_at_once):
                own = tokens[first : first + n_at_once]
                queries = to_float32(trace.stored(layer, "queries")[group, own], shape.dtype)
                n_seen = int(own[-1]) + 1
                outputs = head_outputs(
                    queries, keys[kv_head, :n_seen], values[kv_head, :n_seen], own + 1, trace.scale
                )
                steps = self._steps[first : first + n_at_once]
                found.append(products(self._of_head(layer, kv_head, steps), self._dtype, outputs))
            yield np.concatenate(found, axis=1)
