"""Whether NumPy's matrix products run as fast as they could, and one line on standard error if not."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# All kernels of OpenBLAS but skylakex, cooperlake and sapphirerapids.
_WITHOUT_AVX512 = (
    *("katmai", "coppermine", "northwood", "prescott", "banias", "atom", "core2", "penryn", "dunnington"),
    *("nehalem", "athlon", "opteron", "opteron_sse3", "barcelona", "nano", "sandybridge", "bobcat"),
    *("bulldozer", "piledriver", "steamroller", "excavator", "haswell", "zen"),
)
# The variables that each library asks for its number of threads, the first that is set counts.
_THREADS = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "blis": ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
    "accelerate": ("VECLIB_MAXIMUM_THREADS",),
}


def use_one_thread(*libraries: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have BLAS run in its caller's thread, unless the user chose otherwise; to be called before NumPy loads.

    Layers are replayed side by side, and two pools would fight for the cores. It holds for one worker too, so
    that products are cut in the same way, and add up to the same bits, whatever the number of workers.
    Without names, openblas, mkl, blis and accelerate are told; they look into ``environ``.
    """
    for library in libraries or _THREADS:
        names = _THREADS[library]
        if not any(name in environ for name in names):
            environ[names[0]] = "1"


def warn(n_workers: int) -> None:
    """Say in one line on standard error what slows the products down; nothing if nothing does."""
    slow = [found for found in (narrow_kernels(), crowded_threads(n_workers)) if found]
    if slow:
        print(f"sim: {'; '.join(slow)}", file=sys.stderr)


def narrow_kernels(environ: Mapping[str, str] = os.environ) -> str | None:
    """Tell if ``OPENBLAS_CORETYPE`` keeps OpenBLAS from AVX-512 on a processor that has it."""
    core = environ.get("OPENBLAS_CORETYPE", "")
    if "openblas" not in blas_name() or "avx512vl" not in cpu_flags():
        return None
    if core.lower() not in _WITHOUT_AVX512:
        return None
    return (
        f"OPENBLAS_CORETYPE={core} keeps OpenBLAS from AVX-512, which this processor has: products take up "
        "to twice as long; unset OPENBLAS_CORETYPE"
    )


def crowded_threads(n_workers: int, environ: Mapping[str, str] = os.environ) -> str | None:
    """Tell if BLAS starts threads of its own in every one of several workers."""
    if n_workers == 1:
        return None
    name = blas_name()
    variables = next((names for key, names in _THREADS.items() if key in name), ("OMP_NUM_THREADS",))
    n_threads = _loaded_threads()
    if n_threads is None:
        asked = next((environ[name] for name in variables if name in environ), "")
        n_threads = int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1
    if n_threads == 1:
        return None
    return (
        f"{name} runs {n_threads} threads in each of {n_workers} workers, which then wait for each other; "
        f"set {variables[0]}=1"
    )


def blas_name() -> str:
    """Give the name of NumPy's BLAS in lower case, such as ``scipy-openblas``; loads NumPy."""
    import numpy as np

    found = np.show_config(mode="dicts")
    return str(found.get("Build Dependencies", {}).get("blas", {}).get("name", "BLAS")).lower()


def cpu_flags() -> Collection[str]:
    """List what the processor can do, in the words of Linux; empty elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(found, "").split())


def _loaded_threads() -> int | None:
    """Ask the loaded libraries themselves, if threadpoolctl is there to ask."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(threads, default=None)
