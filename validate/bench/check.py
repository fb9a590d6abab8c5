"""Before a kernel is timed: that it gives what its twin in torch gives, on this very device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from traces.errors import NoDeviceError
from validate.bench.kernels import LayerMemory, Setting
from validate.eviction.kernels.ops import Ops

# Largest difference allowed, by type: of outputs, which are of order 1.
_OUTPUT_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of an entry's importance and redundancy, relative to the mean over entries.
_SCORE_ERROR = 1e-3


def check_kernels(ops: Ops, reference: Ops, setting: Setting) -> Iterator[dict[str, object]]:
    """Run every kernel of a compression and a decode step beside its twin.

    Yields
    ------
    dict
        ``kernel``, ``dtype``, ``ragged``, ``error`` and ``allowed``.

    Raises
    ------
    NoDeviceError
        When a kernel is wrong on this device: nothing measured with it would mean anything.
    """
    for name, error, allowed in _errors(ops, reference, setting):
        if not error <= allowed:
            raise NoDeviceError(
                f"kernel '{name}' is wrong on this device: it differs from torch by {error:.2e}, allowed: "
                f"{allowed:.0e}"
            )
        yield {
            "kernel": name,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "ragged": setting.ragged,
            "error": error,
            "allowed": allowed,
        }


def _errors(ops: Ops, reference: Ops, setting: Setting) -> Iterator[tuple[str, float, float]]:
    found, expected = (LayerMemory(setting, seed=0) for _ in range(2))
    tested, twins = found.calls(ops), expected.calls(reference)

    def run(*names: str) -> None:
        for name in names:
            tested[name]()
            twins[name]()

    run("attention")
    yield "attention", _difference(found.output, expected.output), _OUTPUT_ERROR[setting.dtype]
    run("importance", "redundancy", "scores")
    for name, ours, theirs in (
        ("importance", found.importance[found.candidates], expected.importance[found.candidates]),
        ("redundancy", found.repeated, expected.repeated),
        ("scores", found.scores[found.candidates], expected.scores[found.candidates]),
    ):
        yield name, _difference(ours, theirs) / float(theirs.abs().mean()), _SCORE_ERROR
    # From here on both decide by the same scores, so that nothing may differ.
    expected.scores.copy_(found.scores)
    run("demand", "selection", "compaction")
    kept = expected.kept_slots
    for name, ours, theirs in (
        ("demand", found.counts, expected.counts),
        ("selection", found.kept, expected.kept),
        ("selection", found.survivors[kept], expected.survivors[kept]),
        ("compaction", found.keys[kept], expected.keys[kept]),
        ("compaction", found.values[kept], expected.values[kept]),
        ("compaction", found.positions[kept], expected.positions[kept]),
    ):
        yield name, _difference(ours, theirs), 0.0


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())
