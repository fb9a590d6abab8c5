"""Arrays of one replay to numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from simulator.engine.full_cache import FullCache
from simulator.engine.paged import BLOCK, blocks_held, union_held
from simulator.engine.request import Outcome
from simulator.engine.sampling import Sample
from traces.errors import TraceError
from traces.trace import Trace

# A head looks something up when one key holds more than this share of its attention.
LOOKUP = 0.5


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one policy kept of one trace at one budget, over all decode steps.

    Of a sample, means are unbiased, and what it cannot tell is None: the worst head and ``lost_lookup_rms``
    and the oracle if only some heads were measured, the worst step if not all of everything was.

    Attributes
    ----------
    entries_mean, entries_peak : float
        Entries held per KV head, buffer included.
    bytes_mean, bytes_peak : int
        Keys and values of the whole cache.
    mass_mean, mass_p05, mass_min_head : float
        Retained attention mass: mean and 5th percentile over layer, query head and step; mean over steps
        of the worst KV head.
    miss_rate : float
        Share of (step, layer, query head) whose strongest key under the full cache was evicted before.
    low_mass_rate : float
        Share of (step, layer, query head) that retain less than half of the mass.
    lost_lookup_rate : float
        Share of (step, layer, query head) whose strongest key holds more than half of the full cache's
        attention and was evicted before: the head looks one entry up, and it is gone.
    lost_lookup_rms : float
        Root mean square over steps of the share of (layer, query head) that lose a lookup at that step: what
        one head cannot find others may, but not if all lose it at once.
    lost_lookup_peak : float
        The largest share of one step's lookups that were lost, over steps with at least two: a chain of
        thought breaks at its worst step.
    oracle_mass, gap : float or None
        The bound of ``FullCache.oracle_mass`` at this memory, and how far the policy stays below it at the
        same steps.
    n_steps, n_evictions : int
        Decode steps, and entries evicted over all layers and KV heads.
    mass_error : float or None
        Half of the 95% interval of ``mass_mean`` where only a sample was measured.
    shift_mean : float or None
        How far evictions move predictions, from a trace's sensitivities: the mean over steps of
        ``log(1 + m / 2)``, where ``m`` is the mean over draws of the square of how much the log-probability
        of a drawn token moves, to first order and in nats. None without sensitivities or if only some heads
        were measured.
    bytes_union_mean, bytes_union_peak : int
        What one block table for all layers and KV heads would hold if no entry is moved: a position goes when
        its last head evicts it.
    bytes_paged_mean, bytes_paged_peak : int
        What it would hold if survivors are moved together: as many whole blocks for every head as the longest
        needs.
    """

    entries_mean: float
    entries_peak: float
    bytes_mean: int
    bytes_peak: int
    mass_mean: float
    mass_p05: float
    mass_min_head: float | None
    miss_rate: float
    low_mass_rate: float
    lost_lookup_rate: float
    lost_lookup_rms: float | None
    lost_lookup_peak: float | None
    oracle_mass: float | None
    gap: float | None
    n_steps: int
    n_evictions: int
    mass_error: float | None
    shift_mean: float | None
    bytes_union_mean: int
    bytes_union_peak: int
    bytes_paged_mean: int
    bytes_paged_peak: int

    def __post_init__(self) -> None:
        """Refuse numbers that no trace whose parts fit together can give.

        Raises
        ------
        TraceError
        """
        for item in fields(self):
            value, (low, high) = getattr(self, item.name), RANGES[item.name]
            if value is not None and not low <= value <= high:
                raise TraceError(
                    f"{item.name} is {value:.3g}; allowed: {low:g} to {high:g}; scale, queries, keys and "
                    "log-sum-exps of the trace do not fit together"
                )


# Shares of attention follow from a stored log-sum-exp, which may be off by its tolerance.
_SHARE, _COUNT = (0.0, 1.05), (0.0, float(2**62))
RANGES = {
    item.name: _COUNT if item.name.startswith(("entries_", "bytes_", "n_")) else _SHARE
    for item in fields(Metrics)
} | {"gap": (-1.05, 1.05), "shift_mean": (0.0, float("inf"))}


def measure(trace: Trace, outcome: Outcome, full: FullCache, block: int = BLOCK) -> Metrics:
    """Reduce an outcome to the numbers of a result row; both of the same sample, ``block`` in tokens."""
    shape, sample = trace.shape, full.sample
    n_heads = shape.n_layers * shape.n_kv_heads
    mass, held = outcome.mass, outcome.held
    at_steps = sample.layer_weights @ mass[:, :, full.oracle_at].mean(axis=1, dtype=np.float64)
    oracle = full.oracle_mass(held)
    missed = _missed(trace, outcome, full)
    lookups = full.largest > LOOKUP
    lost = missed & lookups
    of_text = outcome.evicted_at, trace.prompt_tokens, len(held)
    union, paged = union_held(*of_text), blocks_held(*of_text, block)
    per_position = n_heads * shape.bytes_per_entry
    per_head = mass.reshape(*sample.kv_heads.shape, shape.group_size, -1).mean(axis=2, dtype=np.float64)
    return Metrics(
        entries_mean=float(held.mean()) / n_heads,
        entries_peak=float(held.max()) / n_heads,
        bytes_mean=round(float(held.mean()) * shape.bytes_per_entry),
        bytes_peak=int(held.max()) * shape.bytes_per_entry,
        mass_mean=sample.mean(mass),
        mass_p05=float(np.quantile(mass, 0.05)),
        mass_min_head=float((per_head @ sample.step_weights).min()) if sample.has_every_head else None,
        miss_rate=sample.mean(missed),
        low_mass_rate=sample.mean(mass < 0.5),
        lost_lookup_rate=sample.mean(lost),
        lost_lookup_rms=_lost_at_once(lost, sample) if sample.has_every_head else None,
        lost_lookup_peak=_worst_step(lost, lookups) if sample.is_whole else None,
        oracle_mass=float(oracle.mean()) if len(oracle) else None,
        gap=float((oracle - at_steps).mean()) if len(oracle) else None,
        n_steps=len(held),
        n_evictions=outcome.n_evicted,
        mass_error=sample.half_width(mass),
        shift_mean=_mean_shift(outcome.shift, sample),
        bytes_union_mean=round(float(union.mean()) * per_position),
        bytes_union_peak=int(union.max()) * per_position,
        bytes_paged_mean=round(float(paged.mean()) * per_position),
        bytes_paged_peak=int(paged.max()) * per_position,
    )


def _lost_at_once(lost: np.ndarray, sample: Sample) -> float:
    return float(np.sqrt(np.square(lost.mean(axis=(0, 1))) @ sample.step_weights))


def _worst_step(lost: np.ndarray, lookups: np.ndarray) -> float:
    n_lost, n_tried = lost.sum(axis=(0, 1)), lookups.sum(axis=(0, 1))
    several = n_tried >= 2
    return float((n_lost[several] / n_tried[several]).max(initial=0.0))


def _mean_shift(shift: np.ndarray, sample: Sample) -> float | None:
    if not shift.shape[1]:
        return None
    # Layers move the same predictions; a logarithm, since no prediction moves as far as a straight line goes.
    squares = np.square(shift.sum(axis=0, dtype=np.float64)).mean(axis=0)
    return float(np.log1p(squares / 2) @ sample.step_weights)


def lost_lookups(trace: Trace, outcome: Outcome, full: FullCache) -> np.ndarray:
    """Tell where more than half of the attention lay on one key, which was gone.

    Returns
    -------
    bool (n_layers, n_query_heads, n_steps)
    """
    return _missed(trace, outcome, full) & (full.largest > LOOKUP)


def _missed(trace: Trace, outcome: Outcome, full: FullCache) -> np.ndarray:
    """Tell where the strongest key was gone; bool (n_layers, n_query_heads, n_steps)."""
    sample = full.sample
    # The token decoded at step s is position prompt + s; an eviction at that many tokens preceded it.
    now = trace.prompt_tokens + sample.steps
    missed = np.empty(full.strongest.shape, bool)
    for row, layer in enumerate(sample.layers):
        heads = np.repeat(sample.kv_heads[row], trace.shape.group_size)
        missed[row] = outcome.evicted_at[layer][heads[:, None], full.strongest[row]] <= now
    return missed
