"""What every part of a policy must give back; checked once, so that no part can break the replay silently.

Every function here raises a ``PolicyError`` if a part gives anything but what is told, or raises; only
``checked_table`` lets through what a part raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np

from simulator.kernels.attention import protect
from simulator.policies.parts import (
    HeadAllocator,
    HeadRequest,
    LayerAllocator,
    LayerRequest,
    PolicyError,
    Scorer,
    Trigger,
)
from simulator.policies.view import LayerView
from traces.errors import InfeasibleBudgetError, UserError


def checked_scores(scorer: Scorer, layer: LayerView, memory: Any = None) -> list[np.ndarray]:
    """Score the KV heads of a layer and put protected entries above all others.

    Parameters
    ----------
    scorer : Scorer
    layer : LayerView
    memory : object
        The scorer's, of this layer.

    Returns
    -------
    list of float32 (n_entries,), finite but for protected entries, which are plus infinity.
    """
    with _guarded("scorer", scorer.name):
        found = list(scorer.score_layer(layer, memory))
    if len(found) != layer.n_kv_heads:
        raise PolicyError(
            f"scorer '{scorer.name}' returned scores of {len(found)} KV heads; allowed: {layer.n_kv_heads}"
        )
    first, last = scorer.ends(layer)
    checked = []
    for kv_head, (given, positions) in enumerate(zip(found, layer.positions, strict=True)):
        scores = _checked_array(scorer, "scores", given, positions)
        protected = np.empty(len(positions), np.float32)
        bad = protect(scores, positions, first, layer.n_tokens - last, protected)
        _refuse_infinite(scorer, "scores", scores, (layer.layer, kv_head), bad)
        checked.append(protected)
    return checked


def checked_notes(scorer: Scorer, layer: LayerView) -> list[np.ndarray]:
    """Let a stateful scorer note something of every entry; finite float32 (n_entries,) per KV head."""
    with _guarded("scorer", scorer.name):
        found = [scorer.observe(view) for view in layer.heads]
    notes = []
    for kv_head, (given, positions) in enumerate(zip(found, layer.positions, strict=True)):
        notes.append(own := _checked_array(scorer, "notes", given, positions))
        bad = np.flatnonzero(~np.isfinite(own))
        _refuse_infinite(scorer, "notes", own, (layer.layer, kv_head), int(bad[0]) if len(bad) else -1)
    return notes


def asked_memory(scorer: Scorer) -> Any:
    """Ask for what a scorer remembers a layer by."""
    with _guarded("scorer", scorer.name):
        return scorer.new_memory()


def asked_quota(scorer: Scorer, budget: int, n_tokens: int) -> int:
    """Ask how much of its budget a head may fill: a whole number from 0 to the budget."""
    with _guarded("scorer", scorer.name):
        found = scorer.quota(budget, n_tokens)
    if not _is_whole(found) or not 0 <= found <= budget:
        raise PolicyError(
            f"scorer '{scorer.name}' gave a quota of {found!r} at {n_tokens} tokens; allowed: a whole number "
            f"from 0 to the budget, {budget}"
        )
    return int(found)


def _is_whole(found: object) -> bool:
    return isinstance(found, Integral) and not isinstance(found, bool)


@contextmanager
def _guarded(kind: str, name: str) -> Iterator[None]:
    """Turn whatever a user's part raises into the failure of its own cell, not of the others."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # GeneratorExit and SystemExit are no Exceptions
        raise PolicyError(f"{kind} '{name}' raised {type(error).__name__}: {error}") from error


def _checked_array(scorer: Scorer, what: str, given: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        found = _as_numbers(given, f"scorer '{scorer.name}' returned {what}").astype(np.float32, copy=False)
    if found.shape != positions.shape:
        raise PolicyError(
            f"scorer '{scorer.name}' returned {what} of shape {found.shape}; allowed: {positions.shape}"
        )
    return np.ascontiguousarray(found)


def _as_numbers(given: object, where: str) -> np.ndarray:
    """Take what a part gave for an array of real numbers, and nothing that would lose a part of it."""
    if isinstance(given, np.ma.MaskedArray):
        raise PolicyError(f"{where} with a mask; allowed: real numbers without one")
    try:
        found = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        raise PolicyError(f"{where} that are no numbers") from None
    if found.dtype.kind not in "biuf":
        raise PolicyError(f"{where} that are no numbers: of type {found.dtype}; allowed: real numbers")
    return found


def _refuse_infinite(scorer: Scorer, what: str, found: np.ndarray, place: tuple[int, int], bad: int) -> None:
    if bad >= 0:
        layer, kv_head = place
        raise PolicyError(
            f"scorer '{scorer.name}' returned {found[bad]} at slot {bad} of layer {layer}, "
            f"KV head {kv_head}; allowed: finite {what}"
        )


def asked_allocator(
    allocator: LayerAllocator | HeadAllocator, request: LayerRequest | HeadRequest
) -> tuple[np.ndarray, bool]:
    """Let an allocator divide; its budgets, which may be wrong yet, and whether protection was binding."""
    with _guarded("allocator", allocator.name):
        budgets, binding = allocator.allocate(request)  # type: ignore[arg-type]
        return _as_numbers(budgets, f"allocator '{allocator.name}' gave budgets"), bool(binding)


def asked_trigger(trigger: Trigger, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
    """Ask when a layer compresses next: a later token count, or None; a past one would stop the clock.

    Parameters are those of ``Trigger.next_compression``.
    """
    with _guarded("trigger", trigger.name):
        found = trigger.next_compression(n_tokens, n_entries, total, n_kv_heads)
    if found is None:
        return None
    if not _is_whole(found) or found <= n_tokens:
        raise PolicyError(
            f"trigger '{trigger.name}' gave {found!r} as the next compression after {n_tokens} tokens; "
            "allowed: a larger whole number, or None for never"
        )
    return int(found)


def asked_to_fire(trigger: Trigger, token_ids: np.ndarray) -> np.ndarray:
    """Ask at which newest tokens a due compression happens; bool, as ``token_ids``."""
    with _guarded("trigger", trigger.name):
        found = np.asarray(trigger.fires_on(token_ids))
    if found.dtype != bool or found.shape != token_ids.shape:
        raise PolicyError(
            f"trigger '{trigger.name}' fires on {found.dtype} of shape {found.shape}; allowed: bool of shape "
            f"{token_ids.shape}"
        )
    return found


def checked_table(heads: HeadAllocator, request: LayerRequest) -> np.ndarray | None:
    """Ask a head allocator what it knows beforehand; float64 (n_layers, n_kv_heads) or None."""
    table = heads.table(request)
    if table is None:
        return None
    found = _as_numbers(table, f"allocator '{heads.name}' has a table").astype(np.float64)
    allowed = request.n_layers, request.n_kv_heads
    if found.shape != allowed:
        raise PolicyError(f"allocator '{heads.name}' has a table of shape {found.shape}; allowed: {allowed}")
    return found


def checked_budgets(
    allocator: str, budgets: np.ndarray, n: int, total: int | None, protected: int
) -> np.ndarray:
    """Check how an allocator divided ``total`` entries over ``n`` layers or KV heads.

    ``total`` is None for allocators that are known not to meet it.

    Returns
    -------
    int64 (n,), each at least ``protected``, that sum to ``total``.
    """
    if budgets.shape != (n,) or not np.issubdtype(budgets.dtype, np.integer):
        raise PolicyError(
            f"allocator '{allocator}' gave {budgets.dtype} budgets of shape {budgets.shape}; "
            f"allowed: whole numbers of shape ({n},)"
        )
    if budgets.min() < protected:
        raise PolicyError(
            f"allocator '{allocator}' gave a budget of {budgets.min()}; allowed: at least the {protected} "
            "protected entries"
        )
    if total is not None and budgets.sum() != total:
        raise PolicyError(f"allocator '{allocator}' gave {budgets.sum()} entries; allowed: exactly {total}")
    return budgets.astype(np.int64)


def require_an_entry_in_every_layer(allocator: str, budgets: np.ndarray) -> None:
    """Raise an ``InfeasibleBudgetError`` where rounding leaves a layer nothing at all of a small budget."""
    if budgets.min() < 1:
        raise InfeasibleBudgetError(
            f"allocator '{allocator}' leaves layer {int(budgets.argmin())} no entry of a mean budget of "
            f"{budgets.mean():g}; allowed: a larger budget"
        )
