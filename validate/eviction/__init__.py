"""Decoding under a KV budget: evicted entries are gone, and their memory is free.

The door: ``from validate.eviction import EvictingCache, evicting``, on a device ``DeviceCache`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.lazy import loader

if TYPE_CHECKING:
    from validate.eviction.cache import EvictingCache, evicting
    from validate.eviction.device.cache import DeviceCache

_HOMES = {"DeviceCache": "device.cache", "EvictingCache": "cache", "evicting": "cache"}

__all__ = ["DeviceCache", "EvictingCache", "evicting"]

# Loaded on first use: what is in here imports its neighbours, not this door.
__getattr__ = loader(__name__, _HOMES)
