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
    """Return the threads or processes that ``--jobs`` stands for; 0 is ``default``, or one for every core.

    Raises UserError if it is negative.
    """
    if jobs < 0:
        raise UserError(f"--jobs is {jobs}; allowed: 0 (all cores) or more")
    return jobs or default or n_cores()
