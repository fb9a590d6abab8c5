"""Rotary position embeddings as a trace's manifest tells them, for scorers that look ahead in position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.errors import MissingDataError

# Far beyond those of published models.
_MOST_THETA = 1e13
KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotations of a head's first channels, pair (i, i + n) of the 2n rotated ones.

    Attributes
    ----------
    frequencies : float64 (n,)
        Angle per position of every pair.

    References
    ----------
    Su et al. 2021, "RoFormer" (arXiv 2104.09864), in the half-split layout of Llama and Qwen.
    """

    frequencies: np.ndarray

    def rotate(self, vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Turn vectors (..., n_positions, head_dim) forward by their positions; float64."""
        angles = np.asarray(positions, np.float64)[..., None] * self.frequencies
        cosines, sines = np.cos(angles), np.sin(angles)
        n = len(self.frequencies)
        turned = np.array(vectors, np.float64)
        first, second = turned[..., :n].copy(), turned[..., n : 2 * n].copy()
        turned[..., :n] = first * cosines - second * sines
        turned[..., n : 2 * n] = second * cosines + first * sines
        return turned

    def mean_rotation(self, positions: np.ndarray, head_dim: int) -> np.ndarray:
        """Average the rotation matrices of positions; float64 (head_dim, head_dim)."""
        angles = np.asarray(positions, np.float64)[:, None] * self.frequencies
        cosines, sines = np.cos(angles).mean(axis=0), np.sin(angles).mean(axis=0)
        n = len(self.frequencies)
        first, second = np.arange(n), np.arange(n, 2 * n)
        rotation = np.eye(head_dim)
        rotation[first, first] = rotation[second, second] = cosines
        rotation[first, second], rotation[second, first] = -sines, sines
        return rotation


def read_rope(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """Read the RoPE parameters of a trace or model.

    Raises
    ------
    MissingDataError
        If there are none, or they are of a kind that is not known here.
    """
    theta, kind = parameters.get("rope_theta"), parameters.get("rope_type", "default")
    if not isinstance(theta, int | float) or not 1 < theta <= _MOST_THETA:
        raise MissingDataError(
            f"RoPE parameters are {dict(parameters) or 'missing'}; allowed: a rope_theta of 1 to "
            f"{_MOST_THETA:g}, as a trace recorded from a model with RoPE has"
        )
    if kind not in KINDS:
        raise MissingDataError(f"rope_type is '{kind}'; allowed: {', '.join(KINDS)}")
    try:
        n = int(head_dim * float(parameters.get("partial_rotary_factor", 1.0))) // 2
        frequencies = float(theta) ** (-np.arange(n) / max(n, 1))
        with np.errstate(all="ignore"):  # refused below
            if kind == "linear":
                frequencies = frequencies / float(parameters["factor"])
            elif kind == "llama3":
                frequencies = _llama3(frequencies, parameters)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise MissingDataError(f"rope_type '{kind}' lacks or misstates {error}") from None
    if not 1 <= n <= head_dim // 2 or not (np.isfinite(frequencies) & (frequencies > 0)).all():
        raise MissingDataError(
            f"RoPE parameters {dict(parameters)} turn {n} pairs of a head's {head_dim} channels; allowed: "
            f"1 to {head_dim // 2} pairs at finite frequencies above 0"
        )
    return Rope(frequencies)


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Slow the low frequencies down, leave the high ones, blend between (Llama 3.1's scaling)."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    if not 0 < low < high:
        raise ValueError(f"its low_freq_factor {low:g} is not below its high_freq_factor {high:g}")
    turns = float(parameters["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)
