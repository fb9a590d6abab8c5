"""Arrays of one replay to numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.full_cache import FullCache
from simulator.request import Outcome
from traces.trace import Trace

# A head looks something up when one key holds more than this share of its attention.
LOOKUP = 0.5


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one policy kept of one trace at one budget, over all decode steps.

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
    oracle_mass, gap : float
        The bound of ``FullCache.oracle_mass`` at this memory, and how far the policy stays below it at the
        same steps.
    n_steps, n_evictions : int
        Decode steps, and entries evicted over all layers and KV heads.
    """

    entries_mean: float
    entries_peak: float
    bytes_mean: int
    bytes_peak: int
    mass_mean: float
    mass_p05: float
    mass_min_head: float
    miss_rate: float
    low_mass_rate: float
    lost_lookup_rate: float
    lost_lookup_rms: float
    lost_lookup_peak: float
    oracle_mass: float
    gap: float
    n_steps: int
    n_evictions: int


def measure(trace: Trace, outcome: Outcome, full: FullCache) -> Metrics:
    """Reduce an outcome to the numbers of a result row."""
    shape = trace.shape
    n_heads = shape.n_layers * shape.n_kv_heads
    mass, held = outcome.mass, outcome.held
    per_head = mass.reshape(shape.n_layers, shape.n_kv_heads, -1).mean(axis=2, dtype=np.float64)
    at_steps = mass[:, :, full.oracle_steps].mean(axis=(0, 1), dtype=np.float64)
    oracle = full.oracle_mass(held)
    missed = _missed(trace, outcome, full)
    lookups = full.largest > LOOKUP
    lost_per_step = (missed & lookups).mean(axis=(0, 1))
    tried_per_step = lookups.mean(axis=(0, 1))
    several = lookups.sum(axis=(0, 1)) >= 2
    return Metrics(
        entries_mean=float(held.mean()) / n_heads,
        entries_peak=float(held.max()) / n_heads,
        bytes_mean=round(float(held.mean()) * shape.bytes_per_entry),
        bytes_peak=int(held.max()) * shape.bytes_per_entry,
        mass_mean=float(mass.mean(dtype=np.float64)),
        mass_p05=float(np.quantile(mass, 0.05)),
        mass_min_head=float(per_head.min()),
        miss_rate=float(missed.mean()),
        low_mass_rate=float((mass < 0.5).mean()),
        lost_lookup_rate=float(lost_per_step.mean()),
        lost_lookup_rms=float(np.sqrt(np.square(lost_per_step).mean())),
        lost_lookup_peak=float((lost_per_step[several] / tried_per_step[several]).max(initial=0.0)),
        oracle_mass=float(oracle.mean()),
        gap=float((oracle - at_steps).mean()),
        n_steps=mass.shape[2],
        n_evictions=outcome.n_evicted,
    )


def lost_lookups(trace: Trace, outcome: Outcome, full: FullCache) -> np.ndarray:
    """Tell where more than half of the attention lay on one key, which was gone.

    Returns
    -------
    bool (n_layers, n_query_heads, n_steps)
    """
    return _missed(trace, outcome, full) & (full.largest > LOOKUP)


def _missed(trace: Trace, outcome: Outcome, full: FullCache) -> np.ndarray:
    """Tell where the strongest key was gone; bool (n_layers, n_query_heads, n_steps)."""
    heads = np.arange(trace.shape.n_query_heads) // trace.shape.group_size
    # The token decoded at step s is position prompt + s; an eviction at that many tokens preceded it.
    now = np.arange(trace.prompt_tokens, trace.total_tokens)
    missed = np.empty(full.strongest.shape, bool)
    for layer, strongest in enumerate(full.strongest):
        missed[layer] = outcome.evicted_at[layer][heads[:, None], strongest] <= now
    return missed
