"""What a device is, and how long work on it takes."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

# Some 20 ms: longer than the host takes to give a device what is timed.
_HEAD_START_CYCLES = 40_000_000


def device_facts(device: torch.device) -> dict[str, object]:
    """Name the device and the versions of what runs on it."""
    found: dict[str, object] = {"device": "cpu", "memory_gb": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    for package in ("torch", "transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"python": platform.python_version()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Lap:
    """Times of one piece of work after another, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []  # events of the device, or seconds
        self.mark()

    def mark(self) -> None:
        """End one piece and begin the next."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Wait for all of them, and give each one's time."""
        synchronize(self._device)
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) * 1e-3 for before, after in pairs]
        return [after - before for before, after in pairs]


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeat: int) -> float:
    """Return the median time of ``repeat`` calls, taken in turn, after one for what has to be compiled."""
    calls[0]()
    if device.type == "cuda":
        # While the device waits the host gets ahead, so that short work is not timed by its launches.
        torch.cuda._sleep(_HEAD_START_CYCLES)
    lap = Lap(device)
    for call in islice(cycle(calls), repeat):
        call()
        lap.mark()
    return median(lap.seconds())


def copy_bandwidth(device: torch.device, n_bytes: int) -> float:
    """Measure a copy of ``n_bytes`` within the device's memory; bytes read and written per second."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * n_bytes / median_seconds([partial(target.copy_, source)], device, 11)
