"""What a seed may be, wherever one is given."""

from __future__ import annotations

from numbers import Integral

from traces.documents import LARGEST, shown
from traces.errors import UserError


def require_seed(seed: object, name: str = "seed") -> int:
    """Give a seed as a plain int.

    Raises
    ------
    UserError
        If it is no whole number from 0 to the largest of a table; ``name`` is what it was given by.
    """
    if isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) <= LARGEST:
        return int(seed)
    raise UserError(f"{name} is {shown(seed)}; allowed: a whole number from 0 to {LARGEST}")
