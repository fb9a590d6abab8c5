"""What a shell may complete: policies, their parts and metrics."""

from __future__ import annotations

from collections.abc import Iterable


def policies(incomplete: str) -> list[str]:
    """Complete the last name of a comma list of policies such as ``rkv+wave,h2``."""
    from simulator.policies.shipped import ALIASES, HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS

    start = max(incomplete.rfind(","), incomplete.rfind("+")) + 1
    is_part = start > 0 and incomplete[start - 1] == "+"
    names = [*LAYER_ALLOCATORS, *HEAD_ALLOCATORS] if is_part else [*SCORERS, *ALIASES]
    typed = incomplete[start:]
    return [incomplete[:start] + name for name in dict.fromkeys(names) if name.startswith(typed)]


def metrics(incomplete: str) -> list[str]:
    """Complete a metric of replays, or the last of a comma list of them."""
    from simulator.results.metric_names import ESTIMATED, METRICS

    return _last_of_list(incomplete, (*METRICS, *ESTIMATED))


def searchable(incomplete: str) -> list[str]:
    """Complete a metric that a search may go by."""
    from simulator.results.metric_names import SEARCHABLE

    return [name for name in SEARCHABLE if name.startswith(incomplete)]


def compared(incomplete: str) -> list[str]:
    """Complete a metric of replays or of validation, or the last of a comma list of them."""
    from simulator.results.metric_names import COMPARED

    return _last_of_list(incomplete, COMPARED)


def _last_of_list(incomplete: str, known: Iterable[str]) -> list[str]:
    start = incomplete.rfind(",") + 1
    return [incomplete[:start] + name for name in known if name.startswith(incomplete[start:])]
