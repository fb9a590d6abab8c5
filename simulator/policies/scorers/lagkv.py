"""LagKV: entries that stand out from the partition that follows theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Limit, Range, at_least, one_of, parameter
from simulator.policies.view import CacheView

SCORE_SOURCES = ("both", "keys")
_RANKED = Limit(lambda lag: lag >= 2, "2 or more: one entry has no rank")


@dataclass(frozen=True)
class LagKV(Scorer):
    """Rank the entries of every partition by their spread, seen on the scale of the next partition.

    Attributes
    ----------
    sinks : int
        First positions protected, and left out of the partitions.
    lag : int
        Entries per partition. The last full partition and what is left over score highest.
    score_source : str
        ``both`` keys and values, as the paper; ``keys`` alone for traces without values.

    Notes
    -----
    Partitions follow slot order over the entries held after the sinks. Every channel of a partition is put
    on the scale of the next partition's smallest and largest value; an entry's spread is the unbiased
    standard deviation over its channels, then a softmax runs over the partition, and keys and values are
    averaged. The score is the rank in the partition divided by ``lag``, ties to the later entry. With fewer
    than ``sinks`` + 2 ``lag`` entries nothing is ranked: the score rises with the slot, so the newest stay,
    as under ``streamingllm``. Budget and buffer together have to reach that: at small budgets take a smaller
    ``lag``.
    A channel that is constant in the next partition has no scale and counts as 0 (the published code divides
    by zero there), which keeps every score finite.

    The paper cuts each partition once, to a fixed share, as soon as its successor is full. Here all that is
    held is partitioned anew at every compression and the budget decides, as in kvpress.

    References
    ----------
    Liang et al. 2025, "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important"
    (arXiv 2504.04704), section 2.
    """

    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = "Liang et al. 2025, arXiv 2504.04704"
    sinks: int = parameter(4, at_least(0), Range(0, 16))
    lag: int = parameter(128, _RANKED, Range(8, 128, log=True))
    score_source: str = parameter("both", one_of(SCORE_SOURCES))

    @property
    def needs(self) -> frozenset[str]:
        """Values, unless keys alone are asked for."""
        return frozenset({"values"} if self.score_source == "both" else ())

    def score(self, view: CacheView) -> np.ndarray:
        """Score by rank within the partition; 1 at the end."""
        scores = np.ones(view.n_entries, np.float32)
        sinks = min(self.sinks, self.ends(view).first)
        after_sinks = scores[sinks:]
        n_partitions = len(after_sinks) // self.lag
        if n_partitions < 2:
            after_sinks[:] = np.arange(len(after_sinks)) / max(1, len(after_sinks))
            return scores
        partitioned = slice(sinks, sinks + n_partitions * self.lag)
        states = [view.keys]
        if self.score_source == "both":
            assert view.values is not None
            states.append(view.values)
        spreads = np.mean([lag_spread(state[partitioned], self.lag) for state in states], axis=0)
        # Ranked in single precision: entries that differ in the order of their channels alone are to tie.
        ranks = spreads.astype(np.float32).argsort(axis=-1, kind="stable").argsort(axis=-1)
        after_sinks[: ranks.size] = ranks.reshape(-1) / self.lag
        return scores


def lag_spread(states: np.ndarray, lag: int) -> np.ndarray:
    """Give each entry's share of its partition's spread, but for the last; float64 (n_partitions - 1, lag).

    ``states`` is float32 (n_partitions * lag, head_dim).
    """
    # In double precision, where a channel that barely changes does not overflow.
    partitions = states.reshape(-1, lag, states.shape[-1]).astype(np.float64)  # (n_partitions, lag, head_dim)
    lowest = partitions[1:].min(axis=1, keepdims=True)
    ranges = partitions[1:].max(axis=1, keepdims=True) - lowest
    relative = np.zeros_like(partitions[1:])
    np.divide(partitions[:-1] - lowest, ranges, out=relative, where=ranges > 0)
    spread = relative.std(axis=-1, ddof=1)
    weights = np.exp(spread - spread.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
