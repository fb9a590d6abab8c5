"""The Reasoning Wave: how many entries each layer needs, measured once per model and stored."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from simulator.full_cache import group_weights, sampled_steps
from traces.atomic import write_file
from traces.check import check_trace
from traces.errors import MissingDataError, UserError
from traces.trace import Trace

FORMAT, VERSION = "kvbudget-wave", 1


@dataclass(frozen=True)
class Wave:
    """A model's demand for entries, layer by layer.

    Attributes
    ----------
    model, model_revision : str
    rho : float
        The attention mass to hold.
    demand : tuple of float
        Entries needed per KV head, one mean per layer.
    head_demand : tuple of tuple of float
        The same per KV head, (n_layers, n_kv_heads).
    trace_ids : tuple of str
        Traces it was measured on; replaying one of them under this wave is refused.
    n_steps : int
        Decode steps sampled, over all traces.
    """

    model: str
    model_revision: str
    rho: float
    demand: tuple[float, ...]
    head_demand: tuple[tuple[float, ...], ...]
    trace_ids: tuple[str, ...]
    n_steps: int

    def write(self, path: str | Path) -> None:
        """Write the wave as JSON, atomically."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"
        write_file(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def calibrate(
    traces: Sequence[Trace], rho: float = 0.93, steps_per_trace: int = 64, *, check: bool = True
) -> Wave:
    """Measure the demand of every layer: the fewest entries that hold attention mass ``rho``.

    Weights are averaged over the GQA group of each KV head; the demand of a KV head at a step is the
    shortest prefix of its sorted weights that reaches ``rho``. Demands are averaged over sampled decode
    steps and traces, and over heads for the layer.

    Raises
    ------
    UserError
        If there is no trace, one has no decode step, they are of different models, or ``rho`` is not between
        0 and 1.
    TraceError
        If ``check`` finds a trace damaged.

    References
    ----------
    ReasonAlloc (arXiv 2606.11164), level I. The paper leaves open whether heads are averaged before or
    after; this is per KV head, then averaged.
    """
    if not traces:
        raise UserError("calibration needs at least one trace; none was given")
    if not 0 < rho < 1:
        raise UserError(f"rho is {rho}; allowed: between 0 and 1")
    models = sorted({f"{trace.model} {trace.manifest.model_revision}".strip() for trace in traces})
    if len(models) > 1 or len({trace.shape for trace in traces}) > 1:
        raise UserError(f"calibration traces are of several models: {', '.join(models)}; allowed: one")
    for trace in traces:
        if trace.total_tokens == trace.prompt_tokens:
            raise UserError(f"trace {trace.path} has no decode step after its prompt; nothing to measure")
        if check:
            check_trace(trace)
    shape = traces[0].shape
    demand = np.zeros((shape.n_layers, shape.n_kv_heads))
    n_steps = 0
    for trace in traces:
        steps = sampled_steps(trace.total_tokens - trace.prompt_tokens, steps_per_trace)
        n_steps += len(steps)
        for layer in range(shape.n_layers):
            for weights in group_weights(trace, layer, steps + trace.prompt_tokens):
                demand[layer] += entries_to_hold(weights, rho)
    demand /= n_steps
    return Wave(
        model=traces[0].model,
        model_revision=traces[0].manifest.model_revision,
        rho=rho,
        demand=tuple(demand.mean(axis=1).round(3).tolist()),
        head_demand=tuple(tuple(row) for row in demand.round(3).tolist()),
        trace_ids=tuple(trace.trace_id for trace in traces),
        n_steps=n_steps,
    )


def entries_to_hold(weights: np.ndarray, rho: float) -> np.ndarray:
    """Count the fewest entries whose weights sum to ``rho``; float32 (n_rows, n) to int64 (n_rows,)."""
    running = np.cumsum(-np.sort(-weights, axis=1), axis=1, dtype=np.float64)
    return np.minimum((running < rho).sum(axis=1) + 1, weights.shape[1])


def read_wave(path: str | Path) -> Wave:
    """Read a stored wave.

    Raises
    ------
    MissingDataError
        If the file is missing or is no wave of this version.
    """
    try:
        stored: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if stored.pop("format") != FORMAT:
            raise KeyError("format")
        if (version := stored.pop("version")) != VERSION:
            raise MissingDataError(f"wave {path}: version {version} found, this build reads {VERSION}")
        stored["demand"] = tuple(float(value) for value in stored["demand"])
        stored["head_demand"] = tuple(tuple(map(float, row)) for row in stored["head_demand"])
        stored["trace_ids"] = tuple(stored["trace_ids"])
        wave = Wave(**stored)
        demands = [*wave.demand, *(value for row in wave.head_demand for value in row)]
        if not demands or not all(math.isfinite(value) and value > 0 for value in demands):
            raise MissingDataError(
                f"wave {path}: a demand is missing or out of range; allowed: above 0, finite"
            )
        return wave
    except OSError as error:
        raise MissingDataError(f"wave {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MissingDataError(
            f"wave {path} is not a wave file; allowed: what sim calibrate writes"
        ) from None


def tell_unused(paths: Sequence[str | Path], models: Iterable[str]) -> None:
    """Say on standard error which waves are of other models than those at hand, and so change nothing."""
    at_hand = sorted(set(models))
    for path in paths:
        wave = read_wave(path)
        if wave.model not in at_hand:
            print(
                f"sim: wave {path} is of model '{wave.model}' and changes nothing for {', '.join(at_hand)}",
                file=sys.stderr,
            )


def known_waves(paths: Sequence[str | Path] = ()) -> dict[str, Wave]:
    """Collect the waves that ship with the package and those given, which win; by model name."""
    shipped = resources.files("simulator") / "waves"
    waves = {}
    for entry in sorted(shipped.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            with resources.as_file(entry) as path:
                wave = read_wave(path)
            waves[wave.model] = wave
    for given in paths:
        wave = read_wave(given)
        waves[wave.model] = wave
    return waves
