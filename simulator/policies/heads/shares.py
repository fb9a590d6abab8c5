"""What allocators over KV heads share: equal shares, and when those that are fixed are taken."""

from __future__ import annotations

import numpy as np

from simulator.policies.apportion import apportion

# A delta that no run reaches: heads are divided at a layer's first compression, and at its first after the
# layer's budget has changed, but never again. A delta of 0 would not divide them at all.
ONCE = 2**62


def equal_shares(total: int, n: int) -> np.ndarray:
    """Divide a total over n heads alike; int64 (n,)."""
    return apportion(np.full(n, total / n), total)
