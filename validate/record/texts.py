"""Texts of many prompts at once: a decode step reads a model's weights once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulator.policies.language import parse_policy
from validate.eviction.decode import decode
from validate.models.load import LoadedModel, stop_token_ids
from validate.models.next_token import Sampling


def complete(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Decode prompts together with the full cache.

    Parameters
    ----------
    loaded : LoadedModel
    prompts : sequences of token ids
    max_new_tokens : int
    sampling : Sampling
        Every text draws from a generator of its own, of this seed.
    on_tokens : callable, optional
        Told how many tokens of the longest text have been decoded so far.

    Returns
    -------
    list of list of int
        Every text's new tokens, with the one that ended it.

    Raises
    ------
    UserError
        For a prompt without tokens and a model that cannot evict.
    """
    n_steps = 0

    def count(_: object) -> None:
        nonlocal n_steps
        n_steps += 1
        if on_tokens is not None:
            on_tokens(n_steps)

    completions = decode(
        loaded.model,
        prompts,
        parse_policy("fullkv"),
        1,  # an entry would be kept if it were not the full cache
        max_new_tokens,
        stop_ids=stop_token_ids(loaded.model, loaded.tokenizer),
        sampling=sampling,
        on_step=count,
    )
    return [own.token_ids + ([] if own.stop_id is None else [own.stop_id]) for own in completions]
