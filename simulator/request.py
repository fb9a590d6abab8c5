"""One request's life under a policy: arrival, compressions, completion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.contract import checked_budgets, require_an_entry_in_every_layer
from simulator.layer_replay import LayerReplay, Retained
from simulator.policies.base import LayerRequest
from simulator.policy import Policy
from simulator.wave import Wave, known_waves
from traces.errors import UserError
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a request's replay measured.

    Attributes
    ----------
    mass : float32 (n_layers, n_query_heads, n_steps)
        Retained attention mass of every decode step.
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
    """

    mass: np.ndarray
    held: np.ndarray
    evicted_at: np.ndarray
    n_evicted: int
    protection_binding: bool
    retained: list[Retained]


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

    Raises
    ------
    UserError
        If it arrives before tick 0.
    InfeasibleBudgetError
        If the budget does not hold what the policy protects.
    MissingDataError
        If the policy needs a profile that is not known.
    PolicyError
        If the layer allocator breaks its contract.
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
    ) -> None:
        if arrival < 0:
            raise UserError(f"arrival is {arrival}; allowed: 0 or more")
        shape = trace.shape
        asked = LayerRequest(
            n_layers=shape.n_layers,
            entries=entries,
            protected=policy.protected,
            model=trace.model,
            model_revision=trace.manifest.model_revision,
            trace_id=trace.trace_id,
            waves=known_waves() if waves is None else waves,
        )
        budgets, self._layers_binding = divide_over_layers(policy, asked)
        self.trace, self.arrival = trace, arrival
        self.layers = [
            LayerReplay(trace, layer, policy, int(budget), seed=seed, keep_retained=keep_retained)
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

    def outcome(self) -> Outcome:
        """Collect what the layers measured, after completion."""
        return Outcome(
            mass=np.stack([layer.mass for layer in self.layers]),
            held=np.sum([layer.held for layer in self.layers], axis=0),
            evicted_at=np.stack([layer.ledger.evicted_at for layer in self.layers]),
            n_evicted=sum(layer.n_evicted for layer in self.layers),
            protection_binding=self._layers_binding
            or any(layer.compressor.protection_binding for layer in self.layers),
            retained=[kept for layer in self.layers for kept in layer.retained],
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
        If the budget does not hold what the policy protects.
    MissingDataError
        If the policy needs a profile that is not known.
    PolicyError
        If the layer allocator breaks its contract.
    """
    policy.require_feasible(request.entries)
    divided, binding = policy.layers.allocate(request)
    name, total = policy.layers.name, request.n_layers * request.entries
    budgets = checked_budgets(name, divided, request.n_layers, total, policy.protected)
    require_an_entry_in_every_layer(name, budgets)
    return budgets, binding
