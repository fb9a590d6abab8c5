"""What every part of a policy must give back; checked once, so that no part can break the replay silently."""

from __future__ import annotations

import numpy as np

from simulator.policies.base import PolicyError, Scorer
from simulator.view import CacheView
from traces.errors import InfeasibleBudgetError


def checked_scores(scorer: Scorer, view: CacheView) -> np.ndarray:
    """Score a view and put protected entries above all others.

    Returns
    -------
    float32 (n_entries,); protected entries are plus infinity.

    Raises
    ------
    PolicyError
        If the scorer raises, returns another shape, or a score that is not finite.
    """
    try:
        scores = np.asarray(scorer.score(view), np.float32)
    except Exception as error:
        # Whatever a user's scorer raises is the failure of its own cell, not of the others.
        raise PolicyError(f"scorer '{scorer.name}' raised {type(error).__name__}: {error}") from error
    if scores.shape != view.positions.shape:
        raise PolicyError(
            f"scorer '{scorer.name}' returned scores of shape {scores.shape}; allowed: {view.positions.shape}"
        )
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise PolicyError(
            f"scorer '{scorer.name}' returned {scores[bad]} at slot {bad} of layer {view.layer}, "
            f"KV head {view.kv_head}; allowed: finite scores"
        )
    oldest_recent = view.n_tokens - scorer.recent
    protected = (view.positions < scorer.sinks) | (view.positions >= oldest_recent)
    return np.where(protected, np.float32(np.inf), scores)


def checked_budgets(allocator: str, budgets: np.ndarray, n: int, total: int, protected: int) -> np.ndarray:
    """Check how an allocator divided ``total`` entries over ``n`` layers or KV heads.

    Returns
    -------
    int64 (n,), the budgets.

    Raises
    ------
    PolicyError
        If they are not ``n`` whole numbers of at least ``protected`` that sum to ``total``.
    """
    budgets = np.asarray(budgets)
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
    if budgets.sum() != total:
        raise PolicyError(f"allocator '{allocator}' gave {budgets.sum()} entries; allowed: exactly {total}")
    return budgets.astype(np.int64)


def require_an_entry_in_every_layer(allocator: str, budgets: np.ndarray) -> None:
    """Refuse a budget so small that rounding leaves a layer nothing at all.

    Raises
    ------
    InfeasibleBudgetError
    """
    if budgets.min() < 1:
        raise InfeasibleBudgetError(
            f"allocator '{allocator}' leaves layer {int(budgets.argmin())} no entry of a mean budget of "
            f"{budgets.mean():g}; allowed: a larger budget"
        )
