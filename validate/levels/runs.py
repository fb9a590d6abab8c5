"""The levels between a replay and a live run: the trace's tokens go through the model once more.

*Shadow*: the model attends to its full cache, the policy decides and nothing is lost. It must retain exactly
what the simulator retains. *Masked*: what the simulator retains is all that is seen, in one pass. *Forced*:
entries are really evicted, and only the tokens are the trace's. How far the retained mass moves away from the
simulated one is the price of a replay's open loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from simulator.engine.compression import Held
from simulator.engine.full_cache import FullCache
from simulator.engine.layer import Retained
from simulator.engine.loop import Engine
from simulator.engine.metrics import LOOKUP, lost_lookups, measure
from simulator.engine.request import Outcome, Request
from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from traces.errors import UserError
from traces.trace import Trace
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.host.layer import EvictingLayer, to_array
from validate.levels.divergence import FullPredictions, token_ids
from validate.levels.masked import masked_divergence
from validate.levels.outcomes import Forced, Masked, Shadow
from validate.models.causal import BLOCK_LOGITS, causal_attention
from validate.models.next_token import forward_settings
from validate.models.vocabulary import n_token_ids
from validate.record.recorder import observed_shape

# Tokens of one forced pass: the logits of a whole trace would be the largest tensor of all.
_FORCED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a trace and its model do with the full cache: once per trace, for any number of runs."""

    attention: FullCache
    predictions: FullPredictions


def baseline_of(model: PreTrainedModel, trace: Trace) -> Baseline:
    """Attend and predict with the full cache.

    Raises
    ------
    UserError
        If the trace cannot have come from this model.
    """
    require_own(model, trace)
    return Baseline(FullCache(trace), FullPredictions(model, trace))


class _WatchedLayer(EvictingLayer):
    """A layer of one sequence that also keeps what it evicts, and notes what every compression retained."""

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.retained: list[Retained] = []
        self.mass: list[np.ndarray] = []
        self.lost: list[np.ndarray] = []
        self.all_keys, self.all_values = key[0], value[0]
        return super().prefill(query, key, value, scale)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_ids: np.ndarray | None = None,
    ) -> torch.Tensor:
        self.all_keys = torch.cat([self.all_keys, key[0]], 1)
        self.all_values = torch.cat([self.all_values, value[0]], 1)
        return super().step(query, key, value, token_ids)

    def _decide(self, row: int, held: Held) -> list[np.ndarray | None]:
        compression = self.compressors[row].n_compressions
        survivors = super()._decide(row, held)
        for kv_head, (own, slots) in enumerate(zip(held.positions, survivors, strict=True)):
            kept = own if slots is None else own[slots]
            where = (self.layer, kv_head, compression, int(self.n_tokens[row]))
            self.retained.append(Retained(*where, np.array(kept)))
        return survivors


Layer = TypeVar("Layer", bound=_WatchedLayer)
Seen = TypeVar("Seen")


class _ShadowLayer(_WatchedLayer):
    def attend(self, query: torch.Tensor) -> torch.Tensor:
        n_tokens = int(self.n_tokens[0])
        output, _ = causal_attention(
            query[0], self.all_keys[:, :n_tokens], self.all_values[:, :n_tokens], self.scale
        )
        return output[None]


class _ForcedLayer(_WatchedLayer):
    def attend(self, query: torch.Tensor) -> torch.Tensor:
        n_tokens, n_kv_heads, n_new = int(self.n_tokens[0]), len(self.all_keys), query.shape[2]
        retained = torch.zeros(n_kv_heads, 1, n_tokens, 1, device=query.device)
        for kv_head in range(n_kv_heads):
            retained[kv_head, 0, self.pool.positions[self.pool.segment(0, kv_head)]] = 1
        n_at_once = max(1, BLOCK_LOGITS // (query.shape[1] * n_tokens))
        for first in range(0, n_new, n_at_once):
            self._measure(query[0, :, first : first + n_at_once], n_tokens - n_new + first, retained)
        return super().attend(query)

    def _measure(self, query: torch.Tensor, n_before: int, retained: torch.Tensor) -> None:
        """Note the retained mass of consecutive tokens, (n_query_heads, n, head_dim), after ``n_before``."""
        keys = self.all_keys[:, None, : retained.shape[2]].float().transpose(2, 3)
        grouped = query.unflatten(0, (len(keys), -1)).float()  # (n_kv_heads, group_size, n, head_dim)
        logits = (grouped * self.scale) @ keys
        # Later tokens are unseen, hence without weight.
        unseen = torch.ones_like(logits[0, 0], dtype=torch.bool).triu_(n_before + 1)
        weights = logits.masked_fill_(unseen, -torch.inf).softmax(-1)
        # Attention that lies on one key by more than half lies there uniquely.
        largest, where = weights.max(-1)
        is_retained = retained[..., 0].expand(*weights.shape[:2], -1).gather(2, where) == 1
        self.mass.append(to_array((weights @ retained).flatten(0, 1)[..., 0]))
        self.lost.append(((largest > LOOKUP) & ~is_retained).flatten(0, 1).cpu().numpy())


def run_shadow(
    model: PreTrainedModel,
    trace: Trace,
    policy: Policy,
    entries: int,
    *,
    seed: int = 0,
    waves: dict[str, Wave] | None = None,
) -> Shadow:
    """Let a policy decide beside a full-cache run of a trace's tokens, and compare with its replay.

    Parameters
    ----------
    model : PreTrainedModel
        The trace's own.
    trace : Trace
    policy : Policy
    entries : int
        Mean budget in entries per KV head.
    seed : int
        For policies that draw at random.
    waves : dict, optional

    Raises
    ------
    UserError
        If the trace cannot have come from this model.
    """
    run = _TraceRun(model, trace, policy, entries, seed, waves)
    expected = run.replay()
    # As in a recording, token by token: passes over several tokens round differently.
    layers, _ = run.feed(_ShadowLayer, 1, lambda logits: deque(logits, maxlen=0))
    keys_equal = all(np.array_equal(to_array(layer.all_keys), trace.keys(layer.layer)) for layer in layers)
    found = [kept for layer in layers for kept in layer.retained]
    # A replay ends with the last token and does not compress after it.
    found = [kept for kept in found if kept.n_tokens < trace.total_tokens]
    return Shadow(found, expected.retained, keys_equal)


def run_forced(
    model: PreTrainedModel,
    trace: Trace,
    policy: Policy,
    entries: int,
    *,
    seed: int = 0,
    waves: dict[str, Wave] | None = None,
    baseline: Callable[[], Baseline] | None = None,
) -> Forced:
    """Evict for real while the tokens stay the trace's; parameters and errors as `run_shadow`.

    ``baseline`` gives the trace's and model's, so that several runs can share it; it is asked for once the
    replay is done.
    """
    run = _TraceRun(model, trace, policy, entries, seed, waves)
    simulated = run.replay()
    full = baseline_of(model, trace) if baseline is None else baseline()
    layers, divergence = run.feed(_ForcedLayer, _FORCED_TOKENS, full.predictions.compare)
    return Forced(
        forced=np.stack([np.concatenate(layer.mass, axis=1) for layer in layers]),
        simulated=simulated.mass,
        forced_lost=np.stack([np.concatenate(layer.lost, axis=1) for layer in layers]),
        simulated_lost=lost_lookups(trace, simulated, full.attention),
        replayed=measure(trace, simulated, full.attention),
        divergence=divergence,
    )


def run_masked(
    model: PreTrainedModel,
    trace: Trace,
    policy: Policy,
    entries: int,
    *,
    seed: int = 0,
    waves: dict[str, Wave] | None = None,
    baseline: Callable[[], Baseline] | None = None,
) -> Masked:
    """Let the model see what a replay retains, in one pass; parameters and errors as `run_forced`."""
    simulated = _TraceRun(model, trace, policy, entries, seed, waves).replay()
    full = baseline_of(model, trace) if baseline is None else baseline()
    return Masked(
        replayed=measure(trace, simulated, full.attention),
        divergence=masked_divergence(model, trace, simulated.retained, full.predictions),
    )


def require_own(model: PreTrainedModel, trace: Trace) -> None:
    """Refuse a trace that cannot have come from a model, or has nothing to compare.

    Raises
    ------
    UserError
    """
    found, _, _ = observed_shape(model)
    n_known, largest = n_token_ids(model), int(max(trace.token_ids))
    if trace.shape != found or largest >= n_known:
        both = (
            f"{shape.n_layers} layers of {shape.n_query_heads} query and {shape.n_kv_heads} KV heads of "
            f"{shape.head_dim} {shape.dtype}"
            for shape in (trace.shape, found)
        )
        raise UserError(
            f"trace {trace.path.name} has {next(both)} and token ids up to {largest}; the model "
            f"has {next(both)} and {n_known} token ids; allowed: the model the trace was recorded from"
        )
    if trace.total_tokens == trace.prompt_tokens:
        raise UserError(f"trace {trace.path} has no decode step after its prompt; nothing to compare")


@dataclass(frozen=True, slots=True)
class _TraceRun:
    """A policy at a budget over the tokens of a trace, once simulated and once through the trace's model."""

    model: PreTrainedModel
    trace: Trace
    policy: Policy
    entries: int
    seed: int
    waves: dict[str, Wave] | None

    def __post_init__(self) -> None:
        require_own(self.model, self.trace)

    def replay(self) -> Outcome:
        """Simulate it, with what every compression retained."""
        request = Request(
            self.trace, self.policy, self.entries, seed=self.seed, waves=self.waves, keep_retained=True
        )
        (outcome,) = Engine([request]).run()
        return outcome

    @torch.inference_mode()
    def feed(
        self, layer_type: type[Layer], most: int, watch: Callable[[Iterator[torch.Tensor]], Seen]
    ) -> tuple[list[Layer], Seen]:
        """Feed the tokens to the model, those after the prompt up to ``most`` at a time.

        Parameters
        ----------
        layer_type : type of Layer
            Of the cache.
        most : int
            Fewer where layers wait for each other; see ``BackEnd.most_together``.
        watch : callable
            Is handed the logits of the decode steps as they come, (n_tokens, n_vocabulary) each, and takes
            them all.

        Returns
        -------
        list of Layer
        object
            What ``watch`` returns.
        """
        trace = self.trace
        cache = EvictingCache(
            self.model,
            self.policy.resolved(trace.manifest.vocabulary),
            self.entries,
            name=trace.model,
            revision=trace.manifest.model_revision,
            waves=self.waves,
            seeds=[self.seed],
            layer_type=layer_type,
            prompt_tokens=trace.prompt_tokens,
        )
        ids = token_ids(self.model, trace)

        def logits() -> Iterator[torch.Tensor]:
            first = trace.prompt_tokens
            while first < trace.total_tokens:
                new = ids[:, first : first + min(most, cache.back_end.most_together)]
                yield self.model(input_ids=new, past_key_values=cache).logits[0]
                first += new.shape[1]

        with evicting(self.model, cache):
            prompt = ids[:, : trace.prompt_tokens]
            self.model(input_ids=prompt, past_key_values=cache, **forward_settings(self.model))
            seen = watch(logits())
        return [layer for layer in cache.evicting_layers if isinstance(layer, layer_type)], seen
