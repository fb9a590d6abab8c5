"""Expected attention: what queries yet to come will probably attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.parts import Scorer
from simulator.policies.ranges import Range, at_least, parameter
from simulator.policies.view import CacheView


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Score by the attention of normally distributed future queries, times the value's L2 norm.

    Attributes
    ----------
    window : int
        Last queries whose mean and covariance stand for future ones.
    sinks : int
        First positions protected; queries there are outliers and are not counted, unless there are no others.
    n_future : int
        Positions ahead over which the rotation of RoPE is averaged.
    use_covariance, use_values : bool
        Whether the queries' covariance, and the values' norms, take part.
    epsilon : float
        Added to the attention before it is multiplied by the value's norm.

    Notes
    -----
    Recorded queries are turned back by their positions. With their mean m and (biased) covariance S per
    query head, and R the mean rotation over positions n_tokens to n_tokens + n_future - 1, the score is the
    softmax over entries k of ``scale k.Rm + scale^2/2 k.RSR'k``, mean over the GQA group. It is computed in
    double precision.

    The published code sees the hidden states of the whole prompt, or of a buffer while decoding, and takes
    its length for the position; here positions are the true ones, and ``window`` bounds how many queries are
    kept. As there, the mean rotation is applied to both sides of S, which is not the mean of the rotated S.

    References
    ----------
    Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution" (arXiv 2510.00636), section 3.
    """

    name: ClassVar[str] = "expected-attention"
    source: ClassVar[str] = "Devoto et al. 2025, arXiv 2510.00636"
    window: int = parameter(256, at_least(1), Range(1, 32, log=True))
    sinks: int = parameter(4, at_least(0), Range(0, 16))
    n_future: int = parameter(512, at_least(1))
    use_covariance: bool = True
    use_values: bool = True
    epsilon: float = parameter(0.0, at_least(0, finite=True))

    @property
    def needs(self) -> frozenset[str]:
        """RoPE's parameters, and values unless they are left out."""
        return frozenset({"rope", "values"} if self.use_values else {"rope"})

    def score(self, view: CacheView) -> np.ndarray:
        """Score by expected attention; zero at the sinks."""
        scores = np.zeros(view.n_entries, np.float32)
        scored = view.positions >= min(self.sinks, self.ends(view).first)
        if not scored.any():
            return scores
        mean, covariance = self.future_queries(view)
        keys = view.keys[scored].astype(np.float64)
        logits = view.scale * (mean @ keys.T)  # (group_size, n_scored)
        if self.use_covariance:
            logits += view.scale**2 / 2 * ((keys @ covariance) * keys).sum(axis=-1)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        expected = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
        if self.use_values:
            assert view.values is not None
            values = view.values[scored].astype(np.float64)
            expected = (expected + self.epsilon) * np.sqrt((values * values).sum(axis=-1))
        scores[scored] = expected
        return scores

    def future_queries(self, view: CacheView) -> tuple[np.ndarray, np.ndarray]:
        """Estimate mean and covariance of the queries to come.

        Returns
        -------
        mean : float64 (group_size, head_dim)
        covariance : float64 (group_size, head_dim, head_dim)
        """
        assert view.rope is not None
        counted = view.query_positions >= self.sinks
        if not counted.any():
            counted[:] = True
        observed = view.rope.rotate(view.queries[:, counted], -view.query_positions[counted])
        mean = observed.mean(axis=1)
        centred = observed - mean[:, None]
        covariance = centred.transpose(0, 2, 1) @ centred / centred.shape[1]
        ahead = np.arange(view.n_tokens, view.n_tokens + self.n_future)
        rotation = view.rope.mean_rotation(ahead, view.queries.shape[-1])
        return mean @ rotation.T, rotation @ covariance @ rotation.T
