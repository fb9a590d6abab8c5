"""How many threads torch computes with: the one rule for every verb that runs a model."""

from __future__ import annotations

import torch

from simulator.machine import n_cores

# Parameters below which one token's products are too small to share: threads then wait for each other longer
# than they compute, and many times so beside other work. Measured in float32 on two cores: a second thread
# takes 1.7 times as long at 2 million parameters and 5% less at 100 million, beside a busy process twice as
# long at either.
_SMALL = 10**8


def use_threads(n_processes: int = 1, model: torch.nn.Module | None = None) -> None:
    """Share the cores between processes, and keep to one thread for a small model.

    Parameters
    ----------
    n_processes : int
        That compute side by side.
    model : Module, optional
        That reads one token after another of a single text; without it products are as large as a batch.
    """
    is_small = model is not None and sum(own.numel() for own in model.parameters()) < _SMALL
    torch.set_num_threads(1 if is_small else max(1, n_cores() // n_processes))
