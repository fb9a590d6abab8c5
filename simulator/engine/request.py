"""One request's life under a policy: arrival, compressions, completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.engine.layer import Division, LayerReplay, Retained
from simulator.engine.sampling import EVERYTHING, Sample
from simulator.engine.shift import Sensitivities
from simulator.policies.contract import (
    asked_allocator,
    checked_budgets,
    checked_table,
    require_an_entry_in_every_layer,
)
from simulator.policies.language import Policy
from simulator.policies.parts import LayerRequest
from simulator.policies.rope import Rope, read_rope
from simulator.policies.wave import Wave, known_waves
from traces.errors import MissingDataError, UserError
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a request's replay measured.

    Attributes
    ----------
    mass : float32 (n_layers, n_query_heads, n_steps)
        Retained attention mass: of all layers, query heads and decode steps, or of those of ``sample``.
    shift : float32 (n_layers, n_draws, n_steps)
        How much what each layer lost moves the log-probabilities of drawn tokens; no draws without
        sensitivities.
    held : int64 (n_steps,)
        Entries over all layers and KV heads during every decode step.
    evicted_at : int32 (n_layers, n_kv_heads, total_tokens)
        Token count at which each position was evicted; ``ledger.NEVER`` if it was not.
    n_evicted : int
        Entries evicted, over all layers and KV heads.
    protection_binding : bool
        Whether protected entries were a lower bound that some budget sat on.
    retained : list of Retained
        Who was retained after every compression, if asked for.
    divisions : list of Division
        How memory was divided at every compression, by layer and compression.
    sample : Sample
        What was measured.
    """

    mass: np.ndarray
    shift: np.ndarray
    held: np.ndarray
    evicted_at: np.ndarray
    n_evicted: int
    protection_binding: bool
    retained: list[Retained]
    divisions: list[Division]
    sample: Sample


class Request:
    """A recorded sequence that arrives at ``arrival`` on the shared clock and decodes one token per tick.

    Parameters
    ----------
    trace : Trace
    policy : Policy
    entries : int
        Mean budget in entries per KV head.
    arrival : int
    seed : int
    waves : dict, optional
        Known demand profiles by model name; those that ship with the package by default.
    keep_retained : bool
        Keep who is retained after every compression.
    sample : Sample, optional
        What is measured; everything by default.
    sensitivities : Sensitivities, optional
        Of the trace and the sample, to tell how predictions move.

    Raises
    ------
    UserError
        If it arrives before tick 0.
    InfeasibleBudgetError
        If the budget does not hold what the policy protects.
    MissingDataError
        If the policy needs a profile that is not known, or data that the trace lacks.
    PolicyError
        If an allocator breaks its contract.
    """

    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        entries: int,
        *,
        arrival: int = 0,
        seed: int = 0,
        waves: dict[str, Wave] | None = None,
        keep_retained: bool = False,
        sample: Sample | None = None,
        sensitivities: Sensitivities | None = None,
    ) -> None:
        if arrival < 0:
            raise UserError(f"arrival is {arrival}; allowed: 0 or more")
        shape = trace.shape
        policy = policy.resolved(trace.manifest.vocabulary)
        self._asked = LayerRequest(
            n_layers=shape.n_layers,
            entries=entries,
            protected=policy.protected_of(trace.prompt_tokens, entries),
            model=trace.model,
            model_revision=trace.manifest.model_revision,
            trace_id=trace.trace_id,
            waves=known_waves() if waves is None else waves,
            n_kv_heads=shape.n_kv_heads,
        )
        policy.require_feasible(entries, trace.prompt_tokens)
        self.trace, self.policy, self.arrival = trace, policy, arrival
        rope = require_data(
            policy, trace.has_values, trace.manifest.rope, shape.head_dim, f"trace {trace.path}"
        )
        table = checked_table(policy.heads, self._asked)
        # A dynamic allocator divides once it has seen the prompt.
        budgets, self._layers_binding = (
            (np.full(shape.n_layers, entries), False)
            if policy.layers.dynamic
            else divide_over_layers(policy, self._asked)
        )
        self._sample = sample or EVERYTHING.draw(trace, seed)
        n_rows, n_heads = self._sample.kv_heads.shape
        self._mass = np.empty((n_rows, n_heads * shape.group_size, len(self._sample.steps)), np.float32)
        unmeasured = np.empty((0, 0), np.float32)
        protected = policy.protection.ends(trace.prompt_tokens, entries)
        rows = [self._sample.row_of(layer) for layer in range(shape.n_layers)]
        self.layers = [
            LayerReplay(
                trace,
                layer,
                policy,
                int(budget),
                protected=protected,
                seed=seed,
                keep_retained=keep_retained,
                sample=self._sample,
                mass=unmeasured if rows[layer] is None else self._mass[rows[layer]],
                sensitivities=sensitivities,
                rope=rope,
                table=None if table is None else table[layer],
            )
            for layer, budget in enumerate(budgets)
        ]

    @property
    def completion(self) -> int:
        """Tick at which the last token is decoded."""
        return self.arrival + self.trace.total_tokens - self.trace.prompt_tokens

    def tokens_at(self, time: int) -> int:
        """Give the tokens in the cache's history at a tick."""
        return self.trace.prompt_tokens + time - self.arrival

    def time_of(self, n_tokens: int) -> int:
        """Give the tick at which the history holds ``n_tokens`` tokens."""
        return self.arrival + n_tokens - self.trace.prompt_tokens

    def reallocate_layers(self) -> None:
        """Divide the budget over the layers by what they hold now."""
        views = [layer.views() for layer in self.layers]
        budgets, binding = divide_over_layers(self.policy, replace(self._asked, views=views))
        self._layers_binding |= binding
        for layer, entries in zip(self.layers, budgets.tolist(), strict=True):
            layer.compressor.resize(entries)

    def outcome(self) -> Outcome:
        """Collect what the layers measured, after completion."""
        return Outcome(
            mass=self._mass,
            shift=np.stack([layer.shift for layer in self.layers]),
            held=np.sum([layer.held for layer in self.layers], axis=0),
            evicted_at=np.stack([layer.ledger.evicted_at for layer in self.layers]),
            n_evicted=sum(layer.n_evicted for layer in self.layers),
            protection_binding=self._layers_binding
            or any(layer.compressor.protection_binding for layer in self.layers),
            retained=[kept for layer in self.layers for kept in layer.retained],
            divisions=[division for layer in self.layers for division in layer.divisions],
            sample=self._sample,
        )


def divide_over_layers(policy: Policy, request: LayerRequest) -> tuple[np.ndarray, bool]:
    """Give every layer its budget.

    Returns
    -------
    budgets : int64 (n_layers,)
        Entries per KV head.
    binding : bool
        Whether the protected entries were a binding lower bound.

    Raises
    ------
    InfeasibleBudgetError
        If a layer would get no entry.
    MissingDataError
        If the policy needs a profile that is not known.
    PolicyError
        If the layer allocator breaks its contract.
    """
    divided, binding = asked_allocator(policy.layers, request)
    name, total = policy.layers.name, request.n_layers * request.entries
    exact = total if policy.layers.exact else None
    budgets = checked_budgets(name, divided, request.n_layers, exact, request.protected)
    require_an_entry_in_every_layer(name, budgets)
    return budgets, binding


def require_data(
    policy: Policy, has_values: bool, rope: Mapping[str, Any], head_dim: int, where: str
) -> Rope | None:
    """Refuse a policy that needs what is not there, and read the RoPE parameters if it needs those.

    Raises
    ------
    MissingDataError
    """
    needs = policy.scorer.needs if policy.evicts else frozenset()
    if "values" in needs and not has_values:
        raise MissingDataError(
            f"policy '{policy.name}' needs values, and {where} has none; allowed: a trace recorded with "
            "--values"
        )
    if "rope" not in needs:
        return None
    try:
        return read_rope(rope, head_dim)
    except MissingDataError as error:
        raise MissingDataError(f"policy '{policy.name}', {where}: {error}") from None
