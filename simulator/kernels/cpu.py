"""What the processor offers that compiled loops are made for."""

from __future__ import annotations

import platform

from llvmlite.binding import llvm_version_info
from numba.core import config
from numba.core.codegen import get_host_cpu_features


def cpu_features() -> frozenset[str]:
    """Name what Numba compiles for: this processor's features, or those that its user has asked for."""
    text = getattr(config, "CPU_FEATURES", None)
    text = get_host_cpu_features() if text is None else text
    return frozenset(item[1:] for item in text.split(",") if item.startswith("+"))


def is_arm() -> bool:
    """Say whether this is a 64-bit ARM, all of which have the same vectors."""
    return platform.machine().lower() in ("arm64", "aarch64")


def multiplies_pairs() -> bool:
    """Say whether there is an instruction that multiplies and adds pairs of bfloat16 numbers."""
    # Older compilers know it by other operands: 15 does, 20 does not.
    return {"avx512f", "avx512bf16"} <= cpu_features() and llvm_version_info[0] >= 20
