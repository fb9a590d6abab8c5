"""What would happen under a budget: replay of allocation and eviction policies over recorded traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.budget import Budget, parse_budget
    from simulator.cap import entries_of
    from simulator.cells import replay, run_replay
    from simulator.engine import Engine, memory_over_time
    from simulator.policy import Policy, parse_policy
    from simulator.request import Request
    from simulator.wave import Wave, calibrate, read_wave

_HOMES = {
    "Budget": "budget",
    "entries_of": "cap",
    "parse_budget": "budget",
    "Engine": "engine",
    "memory_over_time": "engine",
    "Policy": "policy",
    "parse_policy": "policy",
    "replay": "cells",
    "run_replay": "cells",
    "Request": "request",
    "Wave": "wave",
    "calibrate": "wave",
    "read_wave": "wave",
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


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that ``sim --help`` need not wait for numba.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'simulator' has no attribute '{name}'")
    return getattr(import_module(f"simulator.{_HOMES[name]}"), name)
