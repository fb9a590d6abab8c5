"""What a base installation lacks, and how to get it."""

from __future__ import annotations

# Modules that verbs import when they run, by the extra that brings them.
_EXTRAS = {
    "validate": ("torch", "transformers", "tokenizers", "accelerate", "triton"),
    "plots": ("altair", "vl_convert"),
    "math": ("math_verify",),
    "search": ("optuna",),
    "remote": ("fsspec",),
    "cluster": ("dask", "distributed", "ray"),
}


def how_to_install(module: str | None) -> str | None:
    """Say in one line how to get a module that is not there; None if no extra brings it."""
    root = (module or "").partition(".")[0]
    extra = next((extra for extra, modules in _EXTRAS.items() if root in modules), None)
    if extra is None:
        return None
    cpu = " (without a GPU, PyTorch's CPU build first)"
    return f"{root} is not installed; pip install 'kvbudget[{extra}]'{cpu if root == 'torch' else ''}"
