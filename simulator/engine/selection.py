"""Which slots survive: top-k and ties, settled here and nowhere else."""

from __future__ import annotations

import numpy as np

from simulator.kernels.attention import increases, keep_best


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
    n_entries = len(scores)
    if slot_order == "chronological" and 0 < n_kept < n_entries and increases(positions):
        slots = np.empty(n_kept, np.int64)
        keep_best(scores, np.partition(scores, n_entries - n_kept)[n_entries - n_kept], slots)
        return slots
    kept = np.lexsort((-positions, -scores))[:n_kept]
    if slot_order == "chronological":
        return kept[np.argsort(positions[kept])]
    protected = kept[np.isinf(scores[kept])]
    protected = protected[np.argsort(positions[protected])]
    chosen = kept[~np.isinf(scores[kept])]
    first_chosen = positions.max() if not len(chosen) else positions[chosen].min()
    leading = positions[protected] < first_chosen
    return np.concatenate([protected[leading], chosen, protected[~leading]])
