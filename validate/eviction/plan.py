"""The rows' plan of an evicting cache: what every sequence of a batch may keep, layer by layer.

Knows nothing of torch: a back end carries the plan out, a face tells it what the prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from simulator.engine.request import divide_over_layers, require_data
from simulator.policies.contract import checked_table
from simulator.policies.language import Policy
from simulator.policies.parts import LayerRequest
from simulator.policies.protection import Ends
from simulator.policies.view import CacheView
from simulator.policies.wave import Wave, known_waves
from traces.documents import shown
from traces.errors import UserError
from traces.shape import ModelShape

UNLIMITED = 2**62  # tokens

# Of entries and tokens; far above any, and within what arrays of the device count.
_MOST = 2**31 - 1


class Plan:
    """What every sequence of a batch may keep under a policy, and what the policy knows of the model.

    Parameters
    ----------
    policy : Policy
    shape : ModelShape
    rope : dict
        The model's RoPE parameters.
    entries, name, revision, waves, seeds
        As ``EvictingCache``.

    Attributes
    ----------
    kind : tuple of ModelShape and dict
        Shape and RoPE of the models that it is for.
    rope : Rope or None
        That of the scorer, if it needs one.
    prompts : int64 (n_rows,)
        Tokens of each row's prompt; empty before they are read.
    budgets : int64 (n_rows, n_layers)
        Entries per KV head; of one row before the prompts are read, if all have one budget.

    Raises
    ------
    UserError
        For an argument out of its range.
    InfeasibleBudgetError, MissingDataError, PolicyError
        As ``divide_over_layers``; what is infeasible whatever the prompts are is refused here.
    """

    def __init__(
        self,
        policy: Policy,
        shape: ModelShape,
        rope: dict[str, Any],
        entries: int | Sequence[int],
        *,
        name: str = "",
        revision: str = "",
        waves: dict[str, Wave] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise UserError(f"policy is {shown(policy)}; allowed: what parse_policy gives")
        self.policy, self.shape, self.kind = policy, shape, (shape, rope)
        self._one_budget = isinstance(entries, Integral)
        self._asked = _whole_numbers([entries] if self._one_budget else entries, "entries", 1)
        self._seeds = None if seeds is None else _whole_numbers(seeds, "seeds", 0)
        self._request = LayerRequest(
            n_layers=shape.n_layers,
            entries=0,
            protected=0,
            model=name,
            model_revision=revision,
            trace_id="",
            waves=known_waves() if waves is None else waves,
            n_kv_heads=shape.n_kv_heads,
        )
        self.rope = require_data(policy, True, rope, shape.head_dim, f"model '{name}'")
        self._table = checked_table(policy.heads, self._request)
        self.forget()
        self.budgets = self._divided(np.zeros(len(self._asked), np.int64))

    def forget(self) -> None:
        """Forget the prompts."""
        self.prompts = np.zeros(0, np.int64)

    def require_rows(self, n_rows: int) -> None:
        """Refuse a batch of another size than what was asked for; raises UserError."""
        for kind, given in (("budgets", None if self._one_budget else self._asked), ("seeds", self._seeds)):
            if given is not None and len(given) != n_rows:
                raise UserError(f"{kind} are given for {len(given)} sequences; found: a batch of {n_rows}")

    def read(self, prompts: np.ndarray) -> None:
        """Settle the budgets of a batch with prompts of so many tokens, int64 (n_rows,)."""
        self.prompts, self.budgets = prompts, self._divided(prompts)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Forget all other rows."""
        if len(self.prompts):
            self.prompts, self.budgets = self.prompts[rows], self.budgets[rows]
        if not self._one_budget:
            self._asked = [self._asked[row] for row in rows]
        if self._seeds is not None:
            self._seeds = [self._seeds[row] for row in rows]

    @property
    def seeds(self) -> Sequence[int]:
        """Every row's seed."""
        return range(len(self.prompts)) if self._seeds is None else self._seeds

    def table(self, layer: int) -> np.ndarray | None:
        """Give what the head allocator knows of a layer's heads beforehand, float64 (n_kv_heads,)."""
        return None if self._table is None else self._table[layer]

    def is_divided_at(self, row: int, n_tokens: int) -> bool:
        """Say whether a row's budget is divided over its layers anew once it has so many tokens."""
        n_decoded, delta = n_tokens - int(self.prompts[row]), self.policy.layers.layer_delta
        return n_decoded == 0 or bool(delta and n_decoded % delta == 0)

    def tokens_until_divided(self, row: int, n_tokens: int) -> int:
        """Give how many more tokens a row takes before its budget is divided over its layers anew."""
        n_decoded, delta = n_tokens - int(self.prompts[row]), self.policy.layers.layer_delta
        return delta - n_decoded % delta if delta else UNLIMITED

    def divided_by(self, row: int, views: Sequence[Sequence[CacheView]]) -> np.ndarray:
        """Divide a row's budget by what its layers hold, KV head by KV head; int64 (n_layers,)."""
        asked = self._asked[0 if self._one_budget else row]
        request = self._request_of(asked, int(self.prompts[row]))
        return divide_over_layers(self.policy, replace(request, views=views))[0]

    @property
    def protected(self) -> list[Ends]:
        """Every row's first positions and last entries that stay."""
        pairs = zip(self.prompts.tolist(), self._asked_of(len(self.prompts)), strict=True)
        return [self.policy.protection.ends(prompt, entries) for prompt, entries in pairs]

    def _asked_of(self, n_rows: int) -> list[int]:
        return self._asked * (n_rows if self._one_budget else 1)

    def _request_of(self, entries: int, prompt_tokens: int) -> LayerRequest:
        self.policy.require_feasible(entries, prompt_tokens)
        protected = self.policy.protected_of(prompt_tokens, entries)
        return replace(self._request, entries=entries, protected=protected)

    def _divided(self, prompts: np.ndarray) -> np.ndarray:
        """Give every row's budget per layer, int64 (n_rows, n_layers)."""
        asked = self._asked_of(len(prompts))
        # Prompts matter only where they are kept.
        keys = [
            (entries, int(prompt) if self.policy.protection.prompt else 0)
            for entries, prompt in zip(asked, prompts, strict=True)
        ]
        found = {}
        for entries, prompt in set(keys):
            request = self._request_of(entries, prompt)
            found[entries, prompt] = (
                np.full(request.n_layers, entries)
                if self.policy.layers.dynamic
                else divide_over_layers(self.policy, request)[0]
            )
        return np.array([found[key] for key in keys])


def whole_number(number: object, name: str, least: int) -> int:
    """Give an argument as an int; raises UserError if it is none, below ``least`` or beyond measure."""
    if (
        not isinstance(number, Integral)
        or isinstance(number, bool | np.bool_)
        or not least <= int(number) <= _MOST
    ):
        raise UserError(f"{name} has {shown(number)}; allowed: whole numbers, {least} or more")
    return int(number)


def _whole_numbers(given: object, name: str, least: int) -> list[int]:
    row: list[object] = []
    if isinstance(given, list | tuple | range) or (isinstance(given, np.ndarray) and given.ndim == 1):
        row = list(given)
    if not row:
        raise UserError(f"{name} is {shown(given)}; allowed: a whole number, or one for each sequence")
    return [whole_number(number, name, least) for number in row]
