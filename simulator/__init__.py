"""What would happen under a budget: replay of allocation and eviction policies over recorded traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.lazy import loader

if TYPE_CHECKING:
    from simulator.budget import Budget, parse_budget
    from simulator.cells import replay, run_replay
    from simulator.engine.cap import entries_of
    from simulator.engine.demand import calibrate
    from simulator.engine.loop import Engine, memory_over_time
    from simulator.engine.request import Request
    from simulator.policies.language import Policy, parse_policy
    from simulator.policies.wave import Wave, read_wave

_HOMES = {
    "Budget": "budget",
    "entries_of": "engine.cap",
    "parse_budget": "budget",
    "Engine": "engine.loop",
    "memory_over_time": "engine.loop",
    "Policy": "policies.language",
    "parse_policy": "policies.language",
    "replay": "cells",
    "run_replay": "cells",
    "Request": "engine.request",
    "Wave": "policies.wave",
    "calibrate": "engine.demand",
    "read_wave": "policies.wave",
}

__all__ = [
    "Budget",
    "Engine",
    "Policy",
    "Request",
    "Wave",
    "calibrate",
    "entries_of",
    "memory_over_time",
    "parse_budget",
    "parse_policy",
    "read_wave",
    "replay",
    "run_replay",
]

# Loaded on first use, so that ``sim --help`` need not wait for numba.
__getattr__ = loader(__name__, _HOMES)
