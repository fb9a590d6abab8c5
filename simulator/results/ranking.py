"""How alike two numbers order policies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


def spearman(one: ArrayLike, other: ArrayLike) -> Any:
    """Correlate ranks along the first axis, ties at their mean rank.

    Parameters
    ----------
    one, other : float (n,) or (n, n_columns)

    Returns
    -------
    float or float64 (n_columns,)
        0 where all values of either are the same, which order nothing.
    """
    ranks = [rankdata(own, axis=0) - (len(own) + 1) / 2 for own in (np.asarray(one), np.asarray(other))]
    product = np.sum(ranks[0] * ranks[1], axis=0)
    scale = np.sqrt(np.prod([np.sum(own**2, axis=0) for own in ranks], axis=0))
    found = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return found if found.ndim else float(found)
