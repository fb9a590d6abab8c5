"""Holds a replay against the slow twin: every compression, every budget, every step's mass.

Single precision may decide a near-tie otherwise than double precision. Each such difference is proved to be
one, counted, and adopted by the twin, so that the rest of the run can still be compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise, product
from unittest.mock import patch

import naive
import naive_allocators
import naive_rules
import naive_scorers
import numpy as np

from simulator.engine.compression import Compressor
from simulator.engine.loop import Engine
from simulator.engine.request import Outcome, Request
from simulator.policies.language import parse_policy
from simulator.policies.wave import Wave

NEAR = 1e-6  # relative


def make_wave(trace, demand) -> Wave:
    return Wave(
        model=trace.model,
        model_revision="",
        rho=0.93,
        demand=tuple(demand),
        head_demand=tuple((value,) * trace.shape.n_kv_heads for value in demand),
        trace_ids=(),
        n_steps=1,
    )


def replayed(trace, text, entries, *, demand=None, seed=0, jobs=1) -> tuple[Outcome, dict]:
    """Replay one request; give its outcome and, per layer, the head budgets after every reallocation.

    Under -1 are the layer budgets after every reallocation of those.
    """
    waves = {} if demand is None else {trace.model: make_wave(trace, demand)}
    policy = parse_policy(text)
    request = Request(trace, policy, entries, seed=seed, waves=waves, keep_retained=True)
    budgets = defaultdict(list)
    reallocate, reallocate_layers = Compressor.reallocate, Request.reallocate_layers

    def watched(compressor: Compressor, *scored: object) -> None:
        reallocate(compressor, *scored)
        budgets[compressor.layer].append(compressor.budgets.tolist())

    def watched_layers(own: Request) -> None:
        reallocate_layers(own)
        n_kv_heads = trace.shape.n_kv_heads
        budgets[-1].append([layer.compressor.total // n_kv_heads for layer in own.layers])

    with (
        patch.object(Compressor, "reallocate", watched),
        patch.object(Request, "reallocate_layers", watched_layers),
    ):
        (outcome,) = Engine([request], jobs).run()
    return outcome, budgets


def assert_equal_outcomes(one: Outcome, other: Outcome) -> None:
    """Assert that two replays measured and decided the same, bit for bit."""
    for name in ("mass", "held", "evicted_at"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.n_evicted, one.protection_binding) == (other.n_evicted, other.protection_binding)
    for name in ("retained", "divisions"):
        assert [_plain(own) for own in getattr(one, name)] == [_plain(own) for own in getattr(other, name)]


def _plain(record) -> list:
    return [np.asarray(getattr(record, item.name)).tolist() for item in fields(record)]


@dataclass
class Agreement:
    """Settles the twin's decisions by the replay's, having proved that they differ by a near-tie at most."""

    outcome: Outcome
    head_budgets: dict[int, list[list[int]]]
    adopted: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.head_budgets = {layer: list(budgets) for layer, budgets in self.head_budgets.items()}
        self.retained = {(kept.layer, kept.compression, kept.kv_head): kept for kept in self.outcome.retained}
        assert len(self.retained) == len(self.outcome.retained), "a compression was reported twice"
        self.n_decisions = len(self.retained)

    def budgets(self, layer, own, pooled, tau):
        seen = self.head_budgets[layer.index].pop(0)
        assert sum(seen) == layer.total
        if seen != own:
            counts = [
                range(
                    sum(score > tau + NEAR * abs(tau) for score in head),
                    sum(score >= tau - NEAR * abs(tau) for score in head) + 1,
                )
                for head in pooled
            ]
            where = f"layer {layer.index}, {layer.n_tokens} tokens: budgets {seen}, twin {own}"
            assert layer.rules.heads in ("utility", "adakv"), where
            if layer.rules.heads == "adakv":
                fewest, most = [each[0] for each in counts], [each[-1] for each in counts]
                # Whoever holds the last place is near it; a tie needs one more.
                assert sum(most) - sum(fewest) > 1, where
                assert naive_allocators.adakv_within(layer, seen, fewest, most), where
                self.adopted["tie at tau"] += 1
                return seen
            demands = islice(product(*counts), 10_000)
            assert any(
                naive_rules.head_budgets(layer.rules, demand, layer.total) == seen for demand in demands
            ), f"layer {layer.index}, {layer.n_tokens} tokens: budgets {seen}, twin {own}, no tie at tau"
            self.adopted["tie at tau"] += 1
        return seen

    def layer_budgets(self, layers, own, near):
        seen = self.head_budgets[-1].pop(0)
        assert sum(seen) == sum(own)
        if seen != own:
            assert near(seen), f"{layers[0].n_tokens} tokens: layer budgets {seen}, twin {own}, no near-tie"
            self.adopted["layers near a tie"] += 1
        return seen

    def kept(self, layer, kv_head, own, scores):
        where = f"layer {layer.index}, KV head {kv_head}, {layer.n_tokens} tokens"
        found = self.retained.pop((layer.index, layer.n_compressions, kv_head), None)
        assert found is not None, f"{where}: the replay did not compress"
        assert found.n_tokens == layer.n_tokens, f"{where}: the replay compressed at {found.n_tokens}"
        seen = found.positions.tolist()
        if seen != own:
            self._prove_near_tie(layer, kv_head, own, seen, scores, where)
        return seen

    def _prove_near_tie(self, layer, kv_head, own, seen, scores, where) -> None:
        message = f"{where}: replay kept {seen}, twin {own}"
        held = layer.heads[kv_head].positions
        score_of = dict(zip(held, scores, strict=True))
        assert len(seen) == len(own), message
        assert len(set(seen)) == len(seen), message
        assert set(seen) <= set(held), message
        assert all(position in seen for position in held if layer.is_protected(position)), message
        if layer.rules.slot_order == "chronological":
            assert seen == sorted(seen), message
            seen, own = (sorted(kept, key=lambda p: -score_of[p]) for kept in (seen, own))
        pairs = [(score_of[a], score_of[b]) for a, b in zip(seen, own, strict=True) if a != b]
        if all(abs(a - b) <= NEAR * max(abs(a), abs(b)) for a, b in pairs if a != b):
            exact = all(a == b for a, b in pairs)
            self.adopted["exact tie" if exact else "near-tie"] += 1
            return
        if layer.rules.scorer == "lagkv":
            # Ranks are whole numbers, so entries of almost equal spread trade places with a step between.
            spreads = naive_scorers.lag_spreads(layer, kv_head)
            assert min(b - a for own in spreads for a, b in pairwise(sorted(own))) <= NEAR, message
            self.adopted["near-tie of spreads"] += 1
            return
        assert layer.rules.scorer == "rkv", message
        similar = naive_rules.cosines(layer.held_keys(kv_head))
        np.fill_diagonal(similar, 0.0)
        assert np.abs(similar - layer.rules.similarity_threshold).min() <= NEAR, message
        self.adopted["similarity at threshold"] += 1


def agree(trace, text, entries, *, demand=None, seed=0, atol=1e-5) -> Agreement:
    """Assert that the replay and the twin tell the same story; give the account of adopted near-ties."""
    outcome, budgets = replayed(trace, text, entries, demand=demand, seed=seed)
    agreement = Agreement(outcome, budgets)
    run = naive.simulate(trace, text, entries, demand=demand, seed=seed, settle=agreement)
    assert not agreement.retained, f"the twin did not compress where the replay did: {agreement.retained}"
    assert not any(agreement.head_budgets.values()), "the replay reallocated more often than the twin"
    np.testing.assert_array_equal(outcome.held, run.held)
    assert outcome.n_evicted == run.n_evicted
    assert outcome.mass.shape == run.mass.shape
    np.testing.assert_allclose(outcome.mass, run.mass, rtol=0, atol=atol)
    return agreement
