"""Samples of products that are too many to try at every run."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], n: int, seed: int = 1) -> list[Any]:
    """Mark all cases but ``n`` of them, drawn by the seed, for the nightly run.

    Parameters
    ----------
    cases : iterable
        Arguments of one test each, tuples where there are several.
    n : int
        How many every run tries.
    seed : int

    Returns
    -------
    list of ParameterSet
        All cases, in their order.
    """
    cases = list(cases)
    drawn = set(random.Random(seed).sample(range(len(cases)), n))
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if number in drawn else pytest.mark.nightly,
        )
        for number, case in enumerate(cases)
    ]
