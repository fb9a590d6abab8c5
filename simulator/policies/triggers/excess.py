"""What triggers share: when a layer exceeds its budget."""

from __future__ import annotations

import numpy as np

from simulator.policies.parts import Counts


def first_excess(n_tokens: Counts, n_entries: Counts, total: Counts, n_kv_heads: int) -> Counts:
    """Give the first token count, after this one, at which a layer will hold more than ``total`` entries."""
    return n_tokens + np.maximum(1, (total - n_entries) // n_kv_heads + 1)
