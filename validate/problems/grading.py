"""Read the answer from a completion and say whether it is right."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from traces.extras import require_extra
from validate.problems.families import FAMILIES, answer_of

# A cycle that a text ends in counts as a loop if it came round so often and fills so many tokens.
_LEAST_ROUNDS, _LEAST_LENGTH, _LONGEST_PERIOD = 3, 32, 256
# Derailed texts hold what would take for ever to compute, such as towers of powers.
_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Grade:
    """The answer that was read, None without one, and whether it is right."""

    answer: str | None
    right: bool


def grade(text: str, family: str | None, expected: str) -> Grade:
    """Grade a completion: words for the reasoner's families, mathematics for all else.

    Mathematics is read and compared by math-verify: the last boxed expression, or else the last number or
    formula.

    Raises
    ------
    UserError
        If math-verify is needed and not installed.
    """
    if family in FAMILIES:
        found = answer_of(text)
        return Grade(found, found == expected)
    return _grade_mathematics(text, expected)


def graded(task: dict[str, object], text: str) -> dict[str, object]:
    """Add ``decoded_answer`` and ``correct`` to a task with an ``answer``.

    One without is returned as it is, and so is one in mathematics where math-verify is not installed: a
    recording needs no grade. ``text`` is the completion, special tokens left out.
    """
    family, answer = task.get("family"), task.get("answer")
    if answer is None or (family not in FAMILIES and find_spec("math_verify") is None):
        return dict(task)
    try:
        found = grade(text, None if family is None else str(family), str(answer))
    except Exception:  # whatever a parser makes of a derailed text: what was decoded is kept
        return dict(task)
    return dict(task) | {"decoded_answer": found.answer, "correct": found.right}


def require_grader(families: Iterable[str | None]) -> None:
    """Refuse problems that could not be graded once they are decoded.

    Raises
    ------
    UserError
        As `grade`.
    """
    if not set(families) <= set(FAMILIES):
        _math_verify()


def _grade_mathematics(text: str, expected: str) -> Grade:
    parse, verify = _math_verify()
    # The time limit is kept by a signal, which only main threads are given.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    # A bare answer is read as text; between dollars it is mathematics. An escaped dollar is money.
    is_marked = re.search(r"(?<!\\)\$|\\boxed", expected)
    wanted = parse(expected if is_marked else f"${expected}$", parsing_timeout=seconds)
    found = parse(text, parsing_timeout=seconds)
    if not found:
        return Grade(None, False)
    return Grade(str(found[-1]), bool(verify(wanted, found, timeout_seconds=seconds)))


def _math_verify() -> tuple[Any, Any]:
    require_extra("comparing answers in mathematics", "math_verify")
    from math_verify import parse, verify

    # It logs every comparison that takes too long; such an answer is wrong, and that is all.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return parse, verify


def loop_period(token_ids: Sequence[int]) -> int | None:
    """Give the period of the cycle that a text ends in, or None if it does not repeat itself.

    A loop has come round at least three times and fills at least 32 tokens; its period is at most 256.
    """
    tokens = np.asarray(token_ids)
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // _LEAST_ROUNDS) + 1):
        length = max(_LEAST_ROUNDS * period, _LEAST_LENGTH)
        if length > len(tokens):
            break
        tail = tokens[-length:]
        if (tail[period:] == tail[:-period]).all():
            return period
    return None


def first_divergence(token_ids: Sequence[int], reference: Sequence[int]) -> int | None:
    """Give the first step at which a text differs from another, or None if it is the same."""
    shared = min(len(token_ids), len(reference))
    differs = np.flatnonzero(np.asarray(token_ids[:shared]) != np.asarray(reference[:shared]))
    if len(differs):
        return int(differs[0])
    return None if len(token_ids) == len(reference) else shared
