"""Policies: their parts, what a part may see, and the language they are written in.

What a policy of one's own needs is here: ``from simulator.policies import CacheView, Scorer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.lazy import loader

if TYPE_CHECKING:
    from simulator.policies.language import Policy, parse_policies, parse_policy
    from simulator.policies.parts import (
        HeadAllocator,
        HeadRequest,
        LayerAllocator,
        LayerRequest,
        PolicyError,
        Scorer,
        Trigger,
    )
    from simulator.policies.ranges import Choices, Range
    from simulator.policies.view import CacheView, LayerView
    from simulator.policies.wave import Wave, known_waves, read_wave

_HOMES = {
    "CacheView": "view",
    "Choices": "ranges",
    "HeadAllocator": "parts",
    "HeadRequest": "parts",
    "LayerAllocator": "parts",
    "LayerRequest": "parts",
    "LayerView": "view",
    "Policy": "language",
    "PolicyError": "parts",
    "Range": "ranges",
    "Scorer": "parts",
    "Trigger": "parts",
    "Wave": "wave",
    "known_waves": "wave",
    "parse_policies": "language",
    "parse_policy": "language",
    "read_wave": "wave",
}

__all__ = [
    "CacheView",
    "Choices",
    "HeadAllocator",
    "HeadRequest",
    "LayerAllocator",
    "LayerRequest",
    "LayerView",
    "Policy",
    "PolicyError",
    "Range",
    "Scorer",
    "Trigger",
    "Wave",
    "known_waves",
    "parse_policies",
    "parse_policy",
    "read_wave",
]

# Loaded on first use: the parts that ship import the parts' own modules, not this door.
__getattr__ = loader(__name__, _HOMES)
