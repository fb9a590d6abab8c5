"""What was observed: recorded runs of real decoding. Knows nothing of budgets or policies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.arrays import write_trace
    from traces.check import check_trace
    from traces.errors import InfeasibleBudgetError, MissingDataError, NoDeviceError, TraceError, UserError
    from traces.lse import causal_lse
    from traces.manifest import Manifest
    from traces.shape import ModelShape
    from traces.store import find_traces, open_trace
    from traces.synthetic import Recipe, make_synthetic
    from traces.trace import Trace
    from traces.writer import TraceWriter

__all__ = [
    "InfeasibleBudgetError",
    "Manifest",
    "MissingDataError",
    "ModelShape",
    "NoDeviceError",
    "Recipe",
    "Trace",
    "TraceError",
    "TraceWriter",
    "UserError",
    "causal_lse",
    "check_trace",
    "find_traces",
    "make_synthetic",
    "open_trace",
    "write_trace",
]

_HOMES = {
    "traces.arrays": ("write_trace",),
    "traces.check": ("check_trace",),
    "traces.errors": (
        "InfeasibleBudgetError",
        "MissingDataError",
        "NoDeviceError",
        "TraceError",
        "UserError",
    ),
    "traces.lse": ("causal_lse",),
    "traces.manifest": ("Manifest",),
    "traces.shape": ("ModelShape",),
    "traces.store": ("find_traces", "open_trace"),
    "traces.synthetic": ("Recipe", "make_synthetic"),
    "traces.trace": ("Trace",),
    "traces.writer": ("TraceWriter",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line has to start before NumPy would be imported.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'traces' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
