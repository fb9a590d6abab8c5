"""How many threads torch computes with: the one place for every verb that runs a model."""

from __future__ import annotations

import torch

from simulator.workers.cores import n_cores

# Parameters below which one token's products are too small to share: threads then wait for each other longer
# than they compute, and many times so beside other work. Measured in float32 on two cores: a second thread
# takes 1.7 times as long at 2 million parameters and 5% less at 100 million, beside a busy process twice as
# long at either.
_SMALL = 10**8


def is_small(model: torch.nn.Module) -> bool:
    """Tell whether one token's products are too small to share between cores."""
    return sum(own.numel() for own in model.parameters()) < _SMALL


def limit_threads(model: torch.nn.Module) -> None:
    """Keep to one thread where a small model reads one text token by token; else torch's own number stays."""
    if is_small(model):
        torch.set_num_threads(1)


def share_threads(n_processes: int) -> None:
    """Share the cores between processes that compute side by side, each on batches of texts."""
    torch.set_num_threads(max(1, n_cores() // n_processes))
