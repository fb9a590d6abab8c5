"""How many entries each layer needs, measured: the Reasoning Wave of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.engine.full_cache import group_weights, sampled_steps
from simulator.policies.wave import Wave, entries_to_hold
from traces.check import check_trace
from traces.errors import TraceError, UserError
from traces.trace import Trace

# More than sums of 16-bit products differ by.
_TOLERANCE = 0.05


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
        If ``check`` finds a trace damaged, or its weights do not sum to 1.

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
                _require_softmax(trace, layer, weights)
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


def _require_softmax(trace: Trace, layer: int, weights: np.ndarray) -> None:
    """Refuse weights, (n_rows, n), that are none: a trace that was not checked may have a wrong scale."""
    sums = weights.sum(axis=1, dtype=np.float64)
    worst = sums[np.argmax(np.abs(sums - 1))]
    if not abs(worst - 1) <= _TOLERANCE:
        raise TraceError(
            f"trace {trace.path}: weights of layer {layer} sum to {worst:g}; allowed: 1, by its log-sum-exp"
        )
