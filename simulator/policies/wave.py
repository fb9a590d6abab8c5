"""The Reasoning Wave: how many entries each layer needs, measured once per model and stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from traces.errors import MissingDataError
from traces.shape import ModelShape
from traces.stamped import Stamp
from traces.wording import tell_of_other_models

_STAMP = Stamp("kvbudget-wave", 1, "wave", "sim calibrate", MissingDataError, is_writable_by_hand=True)
Demand = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Wave:
    """A model's demand for entries, layer by layer.

    Attributes
    ----------
    model, model_revision : str
    rho : float
        The attention mass to hold.
    demand : tuple of float
        Entries needed per KV head, one mean per layer.
    head_demand : tuple of tuple of float
        The same per KV head, (n_layers, n_kv_heads).
    trace_ids : tuple of str
        Traces it was measured on; replaying one of them under this wave is refused.
    n_steps : int
        Decode steps sampled, over all traces.
    """

    model: str
    model_revision: str
    rho: Annotated[float, Meta(gt=0, lt=1)]
    demand: Annotated[tuple[Demand, ...], Meta(min_length=1)]
    head_demand: tuple[tuple[Demand, ...], ...]
    trace_ids: tuple[str, ...]
    n_steps: Annotated[int, Meta(ge=1)]

    def write(self, path: str | Path) -> None:
        """Write the wave as JSON with a digest of itself, atomically."""
        _STAMP.write(path, self)


def read_wave(path: str | Path) -> Wave:
    """Read a stored wave; one without a digest, such as one that was written by hand, is taken as it is.

    Raises
    ------
    MissingDataError
        If the file is missing, changed, or is no wave of this version.
    """
    wave: Wave = _STAMP.read(path, Wave)
    widths = {len(row) for row in wave.head_demand}
    if len(wave.head_demand) != len(wave.demand) or len(widths) != 1 or 0 in widths:
        raise MissingDataError(
            f"wave {path}: head_demand has {len(wave.head_demand)} layers of {sorted(widths)} KV heads; "
            f"allowed: one number for every head of the {len(wave.demand)} layers"
        )
    return wave


def require_fitting(waves: Mapping[str, Wave], model: str, shape: ModelShape) -> None:
    """Refuse a model's wave that is of another shape than the model, before anything is replayed.

    Raises
    ------
    MissingDataError
    """
    wave = waves.get(model)
    if wave is None:
        return
    found, allowed = (len(wave.demand), len(wave.head_demand[0])), (shape.n_layers, shape.n_kv_heads)
    if found != allowed:
        raise MissingDataError(
            f"the wave of model '{model}' has {found[0]} layers of {found[1]} KV heads; "
            f"allowed: {allowed[0]} of {allowed[1]}, as its trace has"
        )


def known_waves(paths: Sequence[str | Path] = ()) -> dict[str, Wave]:
    """Collect the waves that ship with the package and those given, which win; by model name."""
    shipped = sorted((Path(__file__).parents[1] / "waves").glob("*.json"))
    return {wave.model: wave for wave in map(read_wave, [*shipped, *paths])}


def tell_unused(paths: Sequence[str | Path], models: Iterable[str]) -> None:
    """Say on standard error which waves are of other models than those at hand, and so change nothing."""
    tell_of_other_models({f"wave {path}": read_wave(path).model for path in paths}, models)


def entries_to_hold(weights: np.ndarray, rho: float) -> np.ndarray:
    """Count the fewest entries whose weights sum to ``rho``; float32 (n_rows, n) to int64 (n_rows,)."""
    running = np.cumsum(-np.sort(-weights, axis=1), axis=1, dtype=np.float64)
    return np.minimum((running < rho).sum(axis=1) + 1, weights.shape[1])
