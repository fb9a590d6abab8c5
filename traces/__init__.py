"""What was observed: recorded runs of real decoding. Knows nothing of budgets or policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.lazy import loader

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
    "arrays": ("write_trace",),
    "check": ("check_trace",),
    "errors": (
        "InfeasibleBudgetError",
        "MissingDataError",
        "NoDeviceError",
        "TraceError",
        "UserError",
    ),
    "lse": ("causal_lse",),
    "manifest": ("Manifest",),
    "shape": ("ModelShape",),
    "store": ("find_traces", "open_trace"),
    "synthetic": ("Recipe", "make_synthetic"),
    "trace": ("Trace",),
    "writer": ("TraceWriter",),
}
# The command line has to start before NumPy would be imported.
__getattr__ = loader("traces", {name: module for module, names in _HOMES.items() for name in names})


def __dir__() -> list[str]:
    return sorted(__all__)
