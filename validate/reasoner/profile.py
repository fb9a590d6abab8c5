"""Profile the reasoner from recorded traces: demand of its heads, how stable it is, what heads attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from simulator.engine.full_cache import group_weights, sampled_steps
from simulator.policies.wave import entries_to_hold
from simulator.results.ranking import spearman
from traces.check import check_trace
from traces.errors import UserError
from traces.trace import Trace
from validate.problems.families import FAMILIES
from validate.reasoner.heads import attention_map, describe_heads, mean_masses, typical_heads

FORMAT, VERSION = "kvbudget-profile", 1
RHO = 0.93
STEPS_PER_TRACE = 128
SPLITS = 200


@dataclass(frozen=True)
class Demand:
    """Entries needed by every KV head, summed over the sampled decode steps of one or more traces.

    Attributes
    ----------
    family, problem : str
    n_traces, n_steps : int
    entries : float64 (n_layers, n_kv_heads)
    share : float64 (n_layers, n_kv_heads)
        The same in tokens held at that step.
    """

    family: str
    problem: str
    n_traces: int
    n_steps: int
    entries: np.ndarray
    share: np.ndarray


def measure_demand(trace: Trace, rho: float = RHO, steps_per_trace: int = STEPS_PER_TRACE) -> Demand:
    """Count the entries that hold attention mass ``rho``, as `simulator.engine.demand.calibrate` does.

    Raises
    ------
    UserError
        If the trace has no decode step.
    """
    shape, n_steps = trace.shape, trace.total_tokens - trace.prompt_tokens
    if n_steps == 0:
        raise UserError(f"trace {trace.path} has no decode step after its prompt; nothing to measure")
    positions = sampled_steps(n_steps, steps_per_trace) + trace.prompt_tokens
    entries = np.zeros((shape.n_layers, shape.n_kv_heads))
    share = np.zeros_like(entries)
    for layer in range(shape.n_layers):
        for position, weights in zip(positions, group_weights(trace, layer, positions), strict=True):
            needed = entries_to_hold(weights, rho)
            entries[layer] += needed
            share[layer] += needed / (position + 1)
    task = trace.manifest.task
    family, problem = str(task.get("family", "unknown")), str(task.get("id", trace.trace_id))
    return Demand(family, problem, 1, len(positions), entries, share)


def merge(demands: Sequence[Demand]) -> Demand:
    """Add up demands of one family; every step counts alike. At least one is needed."""
    return Demand(
        demands[0].family,
        demands[0].problem,
        sum(demand.n_traces for demand in demands),
        sum(demand.n_steps for demand in demands),
        np.sum([demand.entries for demand in demands], axis=0),
        np.sum([demand.share for demand in demands], axis=0),
    )


def by_family(demands: Sequence[Demand]) -> dict[str, list[Demand]]:
    """Group demands by family, one per problem; the reasoner's families first, in their order."""
    problems: dict[tuple[str, str], list[Demand]] = {}
    for demand in demands:
        problems.setdefault((demand.family, demand.problem), []).append(demand)
    families: dict[str, list[Demand]] = {}
    for (family, _), traces in sorted(problems.items()):
        families.setdefault(family, []).append(merge(traces))
    known = [family for family in FAMILIES if family in families]
    return {family: families[family] for family in dict.fromkeys([*known, *families])}


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Correlate two vectors by rank, (n,) each; None where one is constant."""
    return None if np.ptp(first) == 0 or np.ptp(second) == 0 else float(spearman(first, second))


def describe_demand(families: dict[str, list[Demand]]) -> dict[str, Any]:
    """Give the mean demand of every family as plain values."""
    described = {}
    for family, problems in families.items():
        total = merge(problems)
        entries, share = total.entries / total.n_steps, total.share / total.n_steps
        described[family] = {
            "traces": total.n_traces,
            "problems": len(problems),
            "steps": total.n_steps,
            "entries": entries.round(3).tolist(),
            "share": share.round(5).tolist(),
            "layer_entries": entries.mean(axis=1).round(3).tolist(),
            "layer_share": share.mean(axis=1).round(5).tolist(),
        }
    return described


def describe_stability(
    families: dict[str, list[Demand]], splits: int = SPLITS, seed: int = 0
) -> dict[str, Any]:
    """Compare demands between families, between halves of one family, and over its problems.

    ``families`` has one demand per problem. Those of a family are split at random ``splits`` times.
    """
    means = {family: _mean_entries(problems) for family, problems in families.items()}
    between = [
        {"families": [first, second], **_correlations(means[first], means[second])}
        for first, second in combinations(families, 2)
    ]
    return {
        "between": between,
        "within": {family: _within(problems, splits, seed) for family, problems in families.items()},
        "variation": {family: _variation(problems) for family, problems in families.items()},
    }


def _mean_entries(demands: Sequence[Demand]) -> np.ndarray:
    total = merge(demands)
    return total.entries / total.n_steps


def _correlations(first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    found = {
        "heads": correlation(first.ravel(), second.ravel()),
        "layers": correlation(first.mean(axis=1), second.mean(axis=1)),
    }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


def _within(problems: Sequence[Demand], splits: int, seed: int) -> dict[str, Any]:
    """Correlate random halves of a family's problems; with an odd number one half has one more."""
    found: dict[str, Any] = {"problems": len(problems), "splits": splits if len(problems) > 1 else 0}
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(found["splits"]):
        order = rng.permutation(len(problems))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        rows.append(_correlations(*(_mean_entries([problems[i] for i in half]) for half in halves)))
    for name in ("heads", "layers"):
        values = np.array([row[name] for row in rows if row[name] is not None])
        found[name] = None
        if len(values):
            low, high = np.percentile(values, [5, 95]).round(4).tolist()
            found[name] = {"mean": round(float(values.mean()), 4), "p5": low, "p95": high}
    return found


def _variation(problems: Sequence[Demand]) -> dict[str, list[float]] | None:
    """Give the coefficient of variation over problems of every layer's mean demand."""
    if len(problems) < 2:
        return None
    found = {}
    for name in ("entries", "share"):
        layers = np.array([getattr(demand, name).mean(axis=1) / demand.n_steps for demand in problems])
        found[name] = (layers.std(axis=0, ddof=1) / layers.mean(axis=0)).round(4).tolist()
    return found


def describe_maps(traces: Sequence[Trace], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Cut a window of attention out of one trace for each of the most typical heads.

    The trace is the shortest of the walk family, or the first one.
    """
    walks = [trace for trace in traces if trace.manifest.task.get("family") == "walk"]
    trace = min(walks, key=lambda trace: trace.total_tokens, default=traces[0])
    task = trace.manifest.task
    return {
        "trace_id": trace.trace_id,
        "problem": task.get("id", ""),
        "family": task.get("family", "unknown"),
        "prompt_tokens": trace.prompt_tokens,
        "heads": [
            chosen | attention_map(trace, chosen["layer"], chosen["head"]) for chosen in typical_heads(rows)
        ],
    }


def profile_traces(
    traces: Sequence[Trace], rho: float = RHO, steps_per_trace: int = STEPS_PER_TRACE, seed: int = 0
) -> dict[str, Any]:
    """Profile one model from its traces; the result can be written as JSON.

    ``rho`` is the attention mass to hold; ``seed`` is that of the random halves.

    Raises
    ------
    UserError
        If there is no trace, one has no decode step, they are of several models, or a setting is out of
        range.
    TraceError
        If a trace is damaged.
    """
    if not traces:
        raise UserError("a profile needs at least one trace; none was given")
    if not 0 < rho < 1:
        raise UserError(f"rho is {rho}; allowed: between 0 and 1")
    if steps_per_trace < 1:
        raise UserError(f"steps per trace is {steps_per_trace}; allowed: 1 or more")
    models = sorted({f"{trace.model} {trace.manifest.model_revision}".strip() for trace in traces})
    if len(models) > 1 or len({trace.shape for trace in traces}) > 1:
        raise UserError(f"traces are of several models or shapes: {', '.join(models)}; allowed: one")
    for trace in traces:
        check_trace(trace)
    families = by_family([measure_demand(trace, rho, steps_per_trace) for trace in traces])
    heads = describe_heads(mean_masses(traces, steps_per_trace))
    first = traces[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": first.model,
        "model_revision": first.manifest.model_revision,
        "n_layers": first.shape.n_layers,
        "n_query_heads": first.shape.n_query_heads,
        "n_kv_heads": first.shape.n_kv_heads,
        "rho": rho,
        "steps_per_trace": steps_per_trace,
        "seed": seed,
        "demand": describe_demand(families),
        "stability": describe_stability(families, seed=seed),
        "heads": heads,
        "maps": describe_maps(traces, heads["rows"]),
    }
