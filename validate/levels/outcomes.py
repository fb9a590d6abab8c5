"""What the levels find: decisions, mass and predictions, and the numbers of their rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from simulator.engine.layer import Retained
from simulator.engine.metrics import Metrics
from validate.levels.divergence import Divergence


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """What the policy decided beside a full-cache run, and what the simulator decided.

    Attributes
    ----------
    found, expected : list of Retained
        After every compression, by layer, compression and KV head.
    keys_equal : bool
        Whether the run's keys are the trace's, bit for bit. On another machine or build of torch they need
        not be, and a near tie may then fall the other way.
    """

    found: list[Retained]
    expected: list[Retained]
    keys_equal: bool

    @property
    def mismatches(self) -> list[tuple[Retained | None, Retained | None]]:
        """Pairs (found, expected) that differ; None where one side has no such compression."""
        found, expected = (
            {(own.layer, own.compression, own.kv_head): own for own in side}
            for side in (self.found, self.expected)
        )
        pairs = [(found.get(key), expected.get(key)) for key in sorted(found.keys() | expected.keys())]
        return [pair for pair in pairs if not _same(*pair)]

    def row(self) -> dict[str, object]:
        """Give the numbers of its row."""
        return {
            "decisions": len(self.expected),
            "mismatches": len(self.mismatches),
            "keys_equal": self.keys_equal,
        }


def _same(mine: Retained | None, theirs: Retained | None) -> bool:
    if mine is None or theirs is None:
        return False
    return mine.n_tokens == theirs.n_tokens and np.array_equal(mine.positions, theirs.positions)


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """Retained mass with entries really gone, beside the simulated one.

    Attributes
    ----------
    forced, simulated : float32 (n_layers, n_query_heads, n_steps)
        Share of the attention over the whole history that falls on what is retained: with the queries and
        keys of the evicting model, and with the trace's.
    forced_lost, simulated_lost : bool (n_layers, n_query_heads, n_steps)
        Where more than half of that attention lies on one key, and it is gone.
    replayed : Metrics
        The replay's numbers.
    divergence : Divergence
        Of the evicting model's predictions.
    """

    forced: np.ndarray
    simulated: np.ndarray
    forced_lost: np.ndarray
    simulated_lost: np.ndarray
    replayed: Metrics
    divergence: Divergence

    @property
    def drift(self) -> np.ndarray:
        """Forced less simulated mass, mean over query heads; float64 (n_layers, n_steps)."""
        return (self.forced - self.simulated).mean(axis=1, dtype=np.float64)

    def row(self) -> dict[str, object]:
        """Give the numbers of its row: the replay's, means over heads and steps, and each layer's drift."""
        numbers: dict[str, object] = asdict(self.replayed) | {
            "forced_mass": float(self.forced.mean(dtype=np.float64)),
            "drift": float(self.drift.mean()),
            "forced_lost_lookup_rate": float(self.forced_lost.mean()),
        }
        numbers |= self.divergence.columns()
        return numbers | {f"drift_layer_{layer}": float(own.mean()) for layer, own in enumerate(self.drift)}

    def steps(self) -> dict[str, np.ndarray]:
        """Give columns of one row per layer and decode step: means over query heads, and the step's KL."""
        n_layers, _, n_steps = self.forced.shape
        measured = {
            "simulated_mass": self.simulated,
            "forced_mass": self.forced,
            "simulated_lost_lookups": self.simulated_lost,
            "forced_lost_lookups": self.forced_lost,
        }
        return {
            "layer": np.repeat(np.arange(n_layers, dtype=np.int32), n_steps),
            "step": np.tile(np.arange(n_steps, dtype=np.int32), n_layers),
            **{name: values.mean(axis=1).reshape(-1) for name, values in measured.items()},
            "kl": np.tile(self.divergence.kl, n_layers),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """What a model predicts that sees no more than the simulator retains.

    Attributes
    ----------
    replayed : Metrics
        The replay's numbers.
    divergence : Divergence
    """

    replayed: Metrics
    divergence: Divergence

    def row(self) -> dict[str, object]:
        """Give the numbers of its row: the replay's, and the divergence of its predictions."""
        return asdict(self.replayed) | self.divergence.columns()
