"""Entries of a batch chosen on the host, by the simulator's own code: for every policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from simulator.policies.view import CacheView
from validate.eviction.back_end import Heads
from validate.eviction.host.layer import EvictingLayer
from validate.eviction.plan import UNLIMITED, Plan


class HostBackEnd:
    """What a batch holds in all layers, each by itself unless budgets move between them; see ``BackEnd``.

    Parameters
    ----------
    plan : Plan
    layer_type : type of EvictingLayer

    Attributes
    ----------
    layers : list of EvictingLayer
        Those that have seen the prompts.
    """

    on_device = False

    def __init__(self, plan: Plan, layer_type: type[EvictingLayer]) -> None:
        self.plan, self._layer_type = plan, layer_type
        self.layers: list[EvictingLayer] = []

    @property
    def n_tokens(self) -> torch.Tensor:
        """Tokens in each row's history; int64 Tensor (n_rows,)."""
        return torch.from_numpy(self.layers[0].n_tokens)

    @property
    def held(self) -> np.ndarray:
        """Entries of each row during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return np.sum([layer.held for layer in self.layers], axis=0)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all pools: keys and values."""
        return sum(layer.pool.bytes_allocated for layer in self.layers)

    @property
    def most_together(self) -> int:
        """Tokens per row that can be read at once now."""
        plan = self.plan
        if not plan.policy.divides_layers_again:
            return UNLIMITED
        if plan.policy.trigger.reads_tokens:
            return 1
        divided = min(
            plan.tokens_until_divided(row, n_tokens)
            for row, n_tokens in enumerate(self.layers[0].n_tokens.tolist())
        )
        return min(divided, *(layer.tokens_until_due() for layer in self.layers))

    def prefill(self, layer: int, heads: Heads, scale: float) -> torch.Tensor:
        """Attend within whole prompts in one layer, and take in what of them is to stay."""
        plan = self.plan
        own = self._layer_type(
            layer,
            plan.policy,
            plan.budgets[:, layer],
            plan.prompts,
            plan.seeds,
            plan.protected,
            plan.rope,
            plan.table(layer),
        )
        self.layers.append(own)
        output = own.prefill(*heads, scale)
        self._divide_after(layer)
        return output

    def step(self, layer: int, heads: Heads, token_ids: np.ndarray | None) -> torch.Tensor:
        """Take in new tokens in one layer, attend from each to what is held, and compress what is due."""
        output = self.layers[layer].step(*heads, token_ids)
        self._divide_after(layer)
        return output

    def keep_rows(self, rows: np.ndarray) -> None:
        """Free all other rows."""
        for layer in self.layers:
            layer.keep_rows(rows)

    def reset(self) -> None:
        """Free everything."""
        self.layers = []

    def _divide_after(self, layer: int) -> None:
        """Once the last layer has attended, divide what rows may keep over layers, where a policy does so."""
        if not self.plan.policy.divides_layers_again or layer < self.plan.shape.n_layers - 1:
            return
        for row, n_tokens in enumerate(self.layers[0].n_tokens.tolist()):
            if self.plan.is_divided_at(row, n_tokens):
                budgets = self.plan.divided_by(row, _Views(self.layers, row))
                for own, entries in zip(self.layers, budgets.tolist(), strict=True):
                    own.resize(row, entries)
        for own in self.layers:
            own.compress_overdue()


class _Views(Sequence[Sequence[CacheView]]):
    """What every layer holds of one row, brought to the processor one layer at a time."""

    def __init__(self, layers: Sequence[EvictingLayer], row: int) -> None:
        self._layers, self._row = layers, row

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, layer: int) -> Sequence[CacheView]: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Sequence[CacheView]]: ...
    def __getitem__(self, layer: int | slice) -> Sequence[CacheView] | Sequence[Sequence[CacheView]]:
        if isinstance(layer, slice):
            return [own.views(self._row) for own in self._layers[layer]]
        return self._layers[layer].views(self._row)
