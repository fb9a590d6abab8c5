"""Which decode steps, layers and KV heads are measured, and how far their mean may be off.

Only the measuring is sampled: every policy still decides from all queries, in every layer and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from traces.errors import UserError
from traces.shape import ModelShape
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is measured of one trace.

    Attributes
    ----------
    steps : int64 (n_sampled,)
        Decode steps, increasing.
    step_weights : float64 (n_sampled,)
        How much each stands for; sums to 1.
    layers : int64 (n_layers,)
        Increasing.
    layer_weights : float64 (n_layers,)
        Sums to 1.
    kv_heads : int64 (n_layers, n_kv_heads)
        Of each of those layers, increasing.
    steps_of, layers_of, kv_heads_of : int
        How many the trace has.
    """

    steps: np.ndarray
    step_weights: np.ndarray
    layers: np.ndarray
    layer_weights: np.ndarray
    kv_heads: np.ndarray
    steps_of: int
    layers_of: int
    kv_heads_of: int

    @property
    def has_every_step(self) -> bool:
        """Whether every decode step is measured."""
        return len(self.steps) == self.steps_of

    @property
    def has_every_head(self) -> bool:
        """Whether all KV heads of all layers are measured."""
        return self.kv_heads.size == self.layers_of * self.kv_heads_of

    @property
    def is_whole(self) -> bool:
        """Whether everything is measured."""
        return self.has_every_step and self.has_every_head

    def row_of(self, layer: int) -> int | None:
        """Give where a layer stands among the measured ones, None if it is not."""
        found = np.flatnonzero(self.layers == layer)
        return int(found[0]) if len(found) else None

    def mean(self, values: np.ndarray) -> float:
        """Estimate the mean over all layers, heads and steps, without bias.

        ``values`` are (n_layers, n_heads, n_sampled); heads of a layer count alike.
        """
        if self.is_whole:
            return float(values.mean(dtype=np.float64))
        return float(self.layer_weights @ values.mean(axis=1, dtype=np.float64) @ self.step_weights)

    def half_width(self, values: np.ndarray) -> float | None:
        """Give half of the 95% interval of ``mean``, None where everything is measured.

        Steps, layers and heads each add the variance of their own choice. Steps and layers are drawn one per
        stratum, whose variance is that of neighbours' differences: a little too large where there is a trend.
        """
        if self.is_whole:
            return None
        by_head = values.reshape(*self.kv_heads.shape, -1, len(self.steps)).mean(axis=2, dtype=np.float64)
        by_layer = by_head.mean(axis=1)  # (n_layers, n_sampled)
        variance, freedom = 0.0, []
        if not self.has_every_step:
            variance += _stratified_variance(self.layer_weights @ by_layer, self.step_weights, self.steps_of)
            freedom.append(len(self.steps) - 1)
        n_layers, n_heads = self.kv_heads.shape
        if n_layers < self.layers_of:
            means = by_layer @ self.step_weights
            variance += _stratified_variance(means, self.layer_weights, self.layers_of)
            freedom.append(n_layers - 1)
        if n_heads < self.kv_heads_of:
            means = by_head @ self.step_weights
            # One head has no spread within its layer; that of all heads is at least as large.
            spread = means.var(axis=1, ddof=1).mean() if n_heads > 1 else means.var(ddof=1)
            unmeasured = 1 - n_heads / self.kv_heads_of
            variance += float(unmeasured * spread * np.square(self.layer_weights).sum() / n_heads)
            freedom.append(n_layers * max(1, n_heads - 1) - (n_heads == 1))
        # Policies are read without it, on machines that only measure a GPU.
        from scipy.special import stdtrit

        return float(stdtrit(min(freedom), 0.975) * np.sqrt(variance))


@dataclass(frozen=True)
class Sampling:
    """How much is to be measured.

    Attributes
    ----------
    queries : Fraction
        Share of the decode steps, in (0, 1].
    layers, kv_heads : int or None
        Layers, and KV heads of each, at least 2 layers; None for all.
    """

    queries: Fraction = Fraction(1)
    layers: int | None = None
    kv_heads: int | None = None

    def __str__(self) -> str:
        queries = None if self.queries == 1 else self.queries
        parts = {"queries": queries, "layers": self.layers, "heads": self.kv_heads}
        return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def require_fits(self, name: str, shape: ModelShape, n_steps: int) -> tuple[int, int, int]:
        """Give how many layers, KV heads of each, and decode steps are measured of a trace.

        Raises
        ------
        UserError
            If fewer than two steps or layers would be measured, or more layers or heads than there are.
        """
        n_layers = shape.n_layers if self.layers is None else self.layers
        n_heads = shape.n_kv_heads if self.kv_heads is None else self.kv_heads
        wanted = round(self.queries * n_steps)
        # A spread is told by two at least.
        least_layers = min(2, shape.n_layers)
        least_heads = min(2, shape.n_kv_heads) if n_layers == 1 else 1
        where = f"allowed for {name}"
        if not least_layers <= n_layers <= shape.n_layers:
            raise UserError(
                f"--sample-layers is {n_layers}; {where}: {least_layers} to {shape.n_layers}, its layers"
            )
        if not least_heads <= n_heads <= shape.n_kv_heads:
            raise UserError(
                f"--sample-heads is {n_heads}; {where}: {least_heads} to {shape.n_kv_heads}, the KV heads "
                "of a layer"
            )
        if wanted < min(2, n_steps):
            raise UserError(
                f"--sample-queries is {self.queries}, less than two of {n_steps} decode steps; {where}: "
                f"{Fraction(2, n_steps)} to 1"
            )
        return n_layers, n_heads, wanted

    def draw(self, trace: Trace, seed: int) -> Sample:
        """Choose steps, layers and heads of a trace; the same for the same trace and seed.

        Raises
        ------
        UserError
            If fewer than two steps or layers would be measured, or more layers or heads than there are.
        """
        shape, n_steps = trace.shape, trace.total_tokens - trace.prompt_tokens
        n_layers, n_heads, wanted = self.require_fits(trace.path.name, shape, n_steps)
        rng = np.random.default_rng([seed, int(trace.trace_id[:15], 16)])
        steps, step_weights = _one_per_stratum(n_steps, wanted, rng)
        layers, layer_weights = _one_per_stratum(shape.n_layers, n_layers, rng)
        heads = [np.sort(rng.permutation(shape.n_kv_heads)[:n_heads]) for _ in layers]
        totals = n_steps, shape.n_layers, shape.n_kv_heads
        return Sample(steps, step_weights, layers, layer_weights, np.array(heads), *totals)


EVERYTHING = Sampling()


def parse_sampling(queries: str | None, layers: int | None, kv_heads: int | None) -> Sampling:
    """Read ``--sample-queries 1/8``, ``--sample-layers 8`` and ``--sample-heads 2``.

    Raises
    ------
    UserError
        If the share of queries is none.
    """
    try:
        share = Fraction(1) if queries is None else Fraction(queries)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UserError(
            f"--sample-queries is '{queries}'; allowed: a share above 0, up to 1, such as 1/8 or 0.125"
        )
    return Sampling(share, layers, kv_heads)


def _one_per_stratum(n: int, n_drawn: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut ``n`` into ``n_drawn`` runs of nearly equal length and draw one of each; with their weights."""
    edges = np.linspace(0, n, n_drawn + 1).round().astype(np.int64)
    return rng.integers(edges[:-1], edges[1:]), np.diff(edges) / n


def _stratified_variance(means: np.ndarray, weights: np.ndarray, n: int) -> float:
    """Give the variance of the weighted mean of one draw per stratum, by the differences of neighbours."""
    squares = np.square(np.diff(means)) / 2
    own = np.concatenate([squares[:1], (squares[:-1] + squares[1:]) / 2, squares[-1:]])
    # A stratum of one member is known.
    unknown = 1 - 1 / np.round(weights * n)
    return float((np.square(weights) * unknown * own).sum())
