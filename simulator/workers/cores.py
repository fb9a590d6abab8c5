"""How many cores there are, and how many workers ``--jobs`` stands for."""

from __future__ import annotations

import os

from traces.errors import UserError


def n_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(jobs: int, default: int | None = None) -> int:
    """Give the threads or processes that ``--jobs`` stands for.

    Parameters
    ----------
    jobs : int
        Zero asks for the default.
    default : int, optional
        One for every core, if it is not given.

    Raises
    ------
    UserError
        If it is negative.
    """
    if jobs < 0:
        raise UserError(f"--jobs is {jobs}; allowed: 0 (all cores) or more")
    return jobs or default or n_cores()
