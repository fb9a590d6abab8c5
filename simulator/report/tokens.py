"""Which tokens were kept: how many KV heads hold each token, on one time axis for all heads."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from traces.trace import Trace

# Times that a slider steps through, and counts of one cell that a page carries.
_MOST_TIMES = 60
_MOST_COUNTS = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """How many KV heads hold each token as time goes on.

    Attributes
    ----------
    times : int64 (n_times,)
        Tokens in the history, ascending; the last is the length of the trace.
    counts : list of int64 (times[i],)
        For every token then in the history, how many of the heads hold its entry.
    n_heads : int
        KV heads of all layers.
    """

    times: np.ndarray
    counts: list[np.ndarray]
    n_heads: int

    def encoded(self) -> dict[str, Any]:
        """Pack the counts for the page: in base64, time after time, each in one byte or in two.

        The second byte of two counts in units of 256.
        """
        size = 1 if self.n_heads < 256 else 2
        packed = np.concatenate(self.counts).astype(f"<u{size}")
        return {
            "times": self.times.tolist(),
            "heads": self.n_heads,
            "size": size,
            "counts": base64.b64encode(packed.tobytes()).decode("ascii"),
        }


def kept_tokens(retained: pl.DataFrame, trace: Trace) -> KeptTokens:
    """Count the heads that hold each token, after every compression of any head.

    Heads compress at different times. At a time, a head holds what its last compression until then retained
    and every token since; before its first compression, everything. ``retained`` has the rows of one policy
    and budget on ``trace``.
    """
    shape = trace.shape
    times = _chosen_times(np.union1d(retained["n_tokens"].to_numpy(), [trace.total_tokens]).astype(np.int64))
    counts = [np.zeros(time, np.int64) for time in times]
    n_heads = shape.n_layers * shape.n_kv_heads
    compressing = 0
    for _, head in retained.group_by("layer", "kv_head"):
        compressing += 1
        _add_head(counts, times, head.sort("n_tokens"))
    for held in counts:
        held += n_heads - compressing
    return KeptTokens(times, counts, n_heads)


def _add_head(counts: list[np.ndarray], times: np.ndarray, head: pl.DataFrame) -> None:
    """Count one head's entries at every time; counts are updated in place."""
    lengths, positions = head["n_tokens"].to_numpy(), head["position"].to_numpy()
    ends = np.unique(lengths)
    for held, time in zip(counts, times, strict=True):
        passed = np.searchsorted(ends, time, side="right")
        if not passed:
            held += 1
            continue
        last = ends[passed - 1]
        held[positions[lengths == last]] += 1
        held[last:] += 1


def _chosen_times(times: np.ndarray) -> np.ndarray:
    """Thin times out evenly, the first and the last included, to what a page can carry."""
    n_times = min(len(times), _MOST_TIMES, max(2, int(_MOST_COUNTS / max(1.0, float(times.mean())))))
    return times[np.unique(np.linspace(0, len(times) - 1, n_times).round().astype(int))]


def token_pieces(trace: Trace) -> list[str]:
    """Give the text of every token of a trace; its id and a space if there is no vocabulary."""
    vocabulary = trace.manifest.vocabulary
    ids = trace.token_ids.tolist()
    if not vocabulary:
        return [f"{token_id} " for token_id in ids]
    return [vocabulary.get(token_id, f"<{token_id}>") for token_id in ids]
