"""Which slots survive: protection, top-k and ties, settled here and nowhere else."""

from __future__ import annotations

import numpy as np

from simulator.policies.base import PolicyError, Scorer
from simulator.view import CacheView


def checked_scores(scorer: Scorer, view: CacheView) -> np.ndarray:
    """Score a view and put protected entries above all others.

    Returns
    -------
    float32 (n_entries,); protected entries are plus infinity.

    Raises
    ------
    PolicyError
        If the scorer returns another shape, or a score that is not finite.
    """
    scores = np.asarray(scorer.score(view), np.float32)
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


def select_slots(scores: np.ndarray, positions: np.ndarray, n_kept: int, slot_order: str) -> np.ndarray:
    """Choose the ``n_kept`` best slots; ties go to the later position.

    Parameters
    ----------
    scores : float32 (n_entries,)
        Protected entries are plus infinity.
    positions : int32 (n_entries,)
    n_kept : int
        At most ``n_entries``, at least the number of protected entries.
    slot_order : str
        ``chronological``: survivors by position. ``score``: protected sinks, then the best first, then the
        protected recent entries in the order they came.

    Returns
    -------
    int64 (n_kept,), slots in their new order.
    """
    kept = np.lexsort((-positions, -scores))[:n_kept]
    if slot_order == "chronological":
        return kept[np.argsort(positions[kept])]
    protected = kept[np.isinf(scores[kept])]
    protected = protected[np.argsort(positions[protected])]
    chosen = kept[~np.isinf(scores[kept])]
    first_chosen = positions.max() if not len(chosen) else positions[chosen].min()
    leading = positions[protected] < first_chosen
    return np.concatenate([protected[leading], chosen, protected[~leading]])
