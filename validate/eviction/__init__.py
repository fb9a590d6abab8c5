"""Decoding under a KV budget: evicted entries are gone, and their memory is free.

The door: ``from validate.eviction import EvictingCache, evicting``, on a device ``DeviceCache`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from validate.eviction.cache import EvictingCache, evicting
    from validate.eviction.device.cache import DeviceCache

_HOMES = {"DeviceCache": "device.cache", "EvictingCache": "cache", "evicting": "cache"}

__all__ = ["DeviceCache", "EvictingCache", "evicting"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: what is in here imports its neighbours, not this door.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'validate.eviction' has no attribute '{name}'")
    return getattr(import_module(f"validate.eviction.{_HOMES[name]}"), name)
