"""Two classes of layers, of which the one that needs less gives up a fixed share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import divide
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Range, between, parameter
from simulator.policies.tables import wave_of


@dataclass(frozen=True)
class Squeeze(LayerAllocator):
    """Two classes of layers: those of low demand get a fixed share of the mean, the others what that frees.

    Attributes
    ----------
    squeeze_share : float
        Budget of a layer of low demand, as a multiple of the mean, though never below the protected entries.

    Notes
    -----
    The paper tells layers apart by the cosine similarity of a token's hidden state before and after the
    layer's attention, and groups them by k-means. A trace has no hidden states: here layers are told apart
    by their measured demand, the wave, in two clusters, the split of the sorted demands that leaves the least
    variance within them. Layers of equal demand are never split, so a
    model whose layers are all alike gets uniform budgets. The paper measures each prompt anew; a wave is
    measured once per model.

    References
    ----------
    Wang et al. 2024, "SqueezeAttention" (arXiv 2404.04793), layer budgets.
    """

    name: ClassVar[str] = "squeeze"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2404.04793"
    needs: ClassVar[frozenset[str]] = frozenset({"wave"})
    squeeze_share: float = parameter(0.4, between(0, 1), Range(0.1, 0.9))

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Divide by the two classes; raises as ``tables.wave_of``."""
        is_low = low_cluster(np.array(wave_of(request).demand, np.float64))
        total, n_low = request.n_layers * request.entries, int(is_low.sum())
        wanted = self.squeeze_share * request.entries
        low = max(float(request.protected), wanted)
        high = (total - n_low * low) / (request.n_layers - n_low)
        return divide(np.where(is_low, low, high), total), n_low > 0 and low > wanted


def low_cluster(values: np.ndarray) -> np.ndarray:
    """Find the lower of the two clusters of least variance within; bool (n,), none if all values are equal.

    Values are not negative. Of several best splits it is the lowest.
    """
    # Relative to the largest, so that squares of very large values stay in the range of a float.
    values = values / (values.max() or 1.0)
    distinct = np.unique(values)
    best, where = np.inf, -np.inf
    for highest in distinct[:-1]:
        low, high = values[values <= highest], values[values > highest]
        spread = float(((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum())
        # A split is better only if it is so beyond rounding errors.
        if spread < best - 1e-9 * float(((values - values.mean()) ** 2).sum()):
            best, where = spread, highest
    return values <= where
