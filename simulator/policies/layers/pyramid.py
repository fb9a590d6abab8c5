"""Budgets that fall from the first layer to the last, exactly and as coded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.policies.apportion import apportion
from simulator.policies.parts import LayerAllocator, LayerRequest
from simulator.policies.ranges import Range, at_least, parameter


@dataclass(frozen=True)
class PyramidLayers(LayerAllocator):
    """Budgets that fall linearly from the first layer to the last.

    Attributes
    ----------
    pyramid_beta : float
        The last layer's evictable entries are the mean over ``pyramid_beta``; the first layer's are twice
        the mean less that.

    Notes
    -----
    The published code floors the step between layers and so overshoots the total by up to 13%; here the
    linear shares are rounded by largest remainder and the total is exact. The protected entries come on top
    of the pyramid in every layer. There is no clamp to the prompt length, since a decoding cache outgrows it.

    References
    ----------
    Cai et al. 2024, "PyramidKV" (arXiv 2406.02069), section 4.2.
    """

    name: ClassVar[str] = "pyramid"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2406.02069"
    pyramid_beta: float = parameter(20.0, at_least(1), Range(2.0, 100.0, log=True))

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give the protected entries plus a linear share of the rest."""
        evictable = request.entries - request.protected
        last = evictable / self.pyramid_beta
        shares = np.linspace(2 * evictable - last, last, request.n_layers)
        if request.n_layers == 1:
            shares = np.array([float(evictable)])
        return request.protected + apportion(shares, request.n_layers * evictable), False


@dataclass(frozen=True)
class PyramidCode(LayerAllocator):
    """Budgets that fall from the first layer to the last in whole steps, as PyramidKV's code has them.

    Attributes
    ----------
    code_beta : int
        As ``pyramid_beta`` of the exact pyramid, whose whole quotient this takes.

    Notes
    -----
    The step between layers is rounded down, so the last layer gets more than it should and the budgets
    exceed the total: by up to 13% of the evictable entries at the published settings. Compare policies by
    the entries they hold, not by their budget. The clamp to the prompt's length is left out as in the exact
    pyramid, since a decoding cache outgrows the prompt, and so is the fall back to uniform budgets for short
    prompts. The protected entries come on top, as the observation window does in the code.

    References
    ----------
    Cai et al. 2024, "PyramidKV" (arXiv 2406.02069), as in the code of KVCache-Factory.
    """

    name: ClassVar[str] = "pyramid-code"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2406.02069, as coded in KVCache-Factory"
    exact: ClassVar[bool] = False
    code_beta: int = parameter(20, at_least(1))

    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give the protected entries plus what the code's integer arithmetic gives."""
        evictable = request.entries - request.protected
        if request.n_layers == 1:
            return np.array([request.entries]), False
        last = evictable // self.code_beta
        first = 2 * evictable - last
        step = (first - last) // (request.n_layers - 1)
        return request.protected + first - step * np.arange(request.n_layers), False
