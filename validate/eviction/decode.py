"""Decode a batch of prompts under a KV budget, each sequence to its own end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from traces.errors import UserError
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.device.cache import DeviceCache
from validate.eviction.device.plan import serves
from validate.eviction.device.steps import Steps
from validate.eviction.face import PolicyCache
from validate.models.load import model_shape
from validate.models.next_token import Sampling, choose_tokens, forward_settings

# Sequences that have ended are dropped once they are this share of the batch.
_DROP_AT = 0.1


@dataclass(frozen=True, slots=True)
class Completion:
    """What one sequence wrote under eviction, and the memory it took.

    Attributes
    ----------
    token_ids : list of int
        New tokens, without the token that ended it.
    ended : bool
        Whether it ended by itself rather than at its limit.
    bytes_peak : int
        Keys and values held during attention, at most, over all decode steps.
    bytes_mean : float
        Their mean over decode steps.
    stop_id : int, optional
        The token that ended it.
    """

    token_ids: list[int]
    ended: bool
    bytes_peak: int
    bytes_mean: float
    stop_id: int | None = None


class _Row:
    """One sequence while it is decoded."""

    def __init__(self, limit: int, sampling: Sampling) -> None:
        self.limit, self.sampling, self.generator = limit, sampling, sampling.generator()
        self.token_ids: list[int] = []
        self.stop_id: int | None = None
        self.peak = self.total = self.n_steps = 0

    @property
    def ended(self) -> bool:
        return self.stop_id is not None

    @property
    def is_running(self) -> bool:
        return not self.ended and len(self.token_ids) < self.limit

    def hold(self, n_entries: int) -> None:
        self.peak = max(self.peak, n_entries)
        self.total, self.n_steps = self.total + n_entries, self.n_steps + 1

    def take(self, token: int, stop_ids: set[int]) -> None:
        if token in stop_ids:
            self.stop_id = token
        else:
            self.token_ids.append(token)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    entries: int | Sequence[int],
    max_new_tokens: int | Sequence[int],
    *,
    stop_ids: Iterable[int],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    name: str = "",
    revision: str = "",
    waves: dict[str, Wave] | None = None,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[PolicyCache], None] = lambda cache: None,
    on_device: bool | None = None,
) -> list[Completion]:
    """Decode under eviction; every sequence has its own budget, limit, sampling and end.

    Parameters
    ----------
    model : PreTrainedModel
    prompts : sequences of token ids, each at least one
    policy : Policy
    entries : int or int per prompt
        Mean budget in entries per KV head.
    max_new_tokens : int or int per prompt
        At least 1.
    stop_ids : iterable of int
        Tokens that end a text.
    sampling : Sampling or Sampling per prompt
        Greedy by default; every sequence draws from a generator of its own.
    name, revision, waves, seeds
        As `EvictingCache`.
    on_step : callable
        Shown the cache after the prompts and after every decode step.
    on_device : bool, optional
        Whether entries are chosen on the model's device, by `DeviceCache`, or on the host; by default on a
        GPU, where policy and model allow it.

    Raises
    ------
    UserError
        For settings out of range and for a model that cannot evict.
    InfeasibleBudgetError, MissingDataError, PolicyError
        As `EvictingCache`.
    """
    n = len(prompts)
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
    samplings = [sampling] * n if isinstance(sampling, Sampling) else list(sampling)
    for what, given in (("max_new_tokens", limits), ("sampling", samplings)):
        if len(given) != n:
            raise UserError(f"{what} is given {len(given)} times; allowed: once, or for each of {n} prompts")
    if not n or min(map(len, prompts)) < 1 or min(limits) < 1:
        raise UserError("a prompt has 0 tokens, or max_new_tokens is 0; allowed: 1 or more")
    stops = set(stop_ids)
    rows = [_Row(limit, each) for limit, each in zip(limits, samplings, strict=True)]
    if on_device is None:
        on_device = model.device.type == "cuda" and serves(model, policy)
    make = partial(DeviceCache, ahead=max(limits)) if on_device else EvictingCache
    cache = make(
        model,
        policy,
        entries,
        prompt_tokens=max(map(len, prompts)),
        name=name,
        revision=revision,
        waves=waves,
        seeds=seeds,
    )
    with evicting(model, cache):
        logits = _read(model, cache, prompts)
        steps, running = Steps(model, cache), list(range(n))
        while True:
            tokens = choose_tokens(
                logits,
                [rows[row].sampling for row in running],
                [rows[row].generator for row in running],
            )
            for row, token in zip(running, tokens, strict=True):
                if rows[row].is_running:
                    rows[row].take(token, stops)
            on_step(cache)
            alive = [at for at, row in enumerate(running) if rows[row].is_running]
            if not alive:
                break
            if len(alive) <= (1 - _DROP_AT) * len(running):
                running = [running[at] for at in alive]
                steps.keep_rows(torch.tensor(alive))
            logits = steps.step(torch.tensor([(rows[row].token_ids or [0])[-1] for row in running]))
            for row, held in zip(running, cache.held.tolist(), strict=True):
                if rows[row].is_running:
                    rows[row].hold(held)
    per_entry = model_shape(model.config, model.dtype).bytes_per_entry
    return [
        Completion(
            row.token_ids,
            row.ended,
            row.peak * per_entry,
            row.total * per_entry / max(1, row.n_steps),
            row.stop_id,
        )
        for row in rows
    ]


def _read(model: PreTrainedModel, cache: PolicyCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Feed all prompts, padded on the left; give the logits after each, (n_rows, n_token_ids)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    column = torch.arange(longest)[None] - (longest - lengths)[:, None]
    given = {"input_ids": ids, "position_ids": column.clamp(min=0), "attention_mask": column >= 0}
    on_device = {name: tensor.to(model.device) for name, tensor in given.items()}
    output = model(**on_device, **forward_settings(model), past_key_values=cache)
    # A copy, since a view would keep the logits of whole prompts alive.
    return output.logits[:, -1].clone()
