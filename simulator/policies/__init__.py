"""Policies: their parts, what a part may see, and the language they are written in.

What a policy of one's own needs is here: ``from simulator.policies import CacheView, Scorer``.
"""

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
