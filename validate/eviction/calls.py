"""The calls that a model makes through an evicting cache: those that are not meant for it are refused.

A cache that hands on new tokens only is right in one case: the model attends through that cache, every layer
in its turn, and tokens come in the order of the text. Anything else gives wrong text without a word, so it is
looked for here: a cache that was forgotten or is another, a second text, positions that do not continue.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, cast

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from traces.errors import UserError
from validate.eviction.plan import whole_number


class Calls:
    """What is known of the text in a cache, and whose turn it is.

    What is not meant for the cache, or does not continue the text, is refused by a UserError.

    Parameters
    ----------
    n_layers : int
    prompt_tokens : int or None
        Tokens of the prompts, padding included, if they are known.
    reads_values : bool
        Whether positions and masks of later passes may be looked at, which waits for a device.

    Attributes
    ----------
    is_open : bool
        Whether a model attends through the cache now.
    prompt_tokens : int or None
    tokens : int Tensor, shape (n_rows, n_new), or None
        Ids being read, where the model was given any.
    """

    def __init__(self, n_layers: int, prompt_tokens: int | None, reads_values: bool) -> None:
        self._n_layers, self._reads_values = n_layers, reads_values
        self.is_open = False
        self.forget(prompt_tokens)

    def forget(self, prompt_tokens: int | None = None) -> None:
        """Begin another text, with prompts of so many tokens if that is known."""
        if prompt_tokens is not None:
            prompt_tokens = whole_number(prompt_tokens, "prompt_tokens", 1)
        self._told = self.prompt_tokens = prompt_tokens
        self._is_guessed = False
        self.tokens: torch.Tensor | None = None
        self._read: list[torch.Tensor] | None = []
        self._lengths: np.ndarray | None = None
        self._n_rows: int | None = None
        self._has_positions = False
        self.begin_again()

    def begin_again(self) -> None:
        """Let the next call start with the first layer, whatever became of the one before."""
        self._turn = 0
        self._handed_on: int | None = None

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all other rows."""
        if self._read is not None:
            self._read = [ids[rows.to(ids.device)] for ids in self._read]
        if self._lengths is not None:
            self._lengths = self._lengths[rows.cpu().numpy()]
        if self._n_rows is not None:
            self._n_rows = len(rows)

    def hand_on(self, layer: int, n_new: int) -> None:
        """Note that a layer's new tokens are on their way to its attention.

        Refused unless a model attends through this cache, and all layers of an earlier call did.
        """
        if not self.is_open:
            raise UserError("an evicting cache is given to a model outside of evicting(model, cache)")
        if self._handed_on is not None or layer != self._turn:
            raise UserError(
                f"layer {layer} of an evicting cache is given tokens in the turn of layer {self._turn}: "
                "another model was given it, or a call broke off; allowed: a new cache, or cache.reset()"
            )
        self._handed_on = n_new

    def attend(self, layer: int, n_new: int, n_keys: int) -> None:
        """Note that attention has come to a layer, which has to have just the tokens that were handed on."""
        if self._handed_on is None or layer != self._turn:
            raise UserError(
                f"layer {layer} attends without the cache of evicting(model, cache); "
                "allowed: past_key_values=cache in every call, without use_cache=False"
            )
        if not self._handed_on == n_new == n_keys:
            raise UserError(
                f"layer {layer} has {n_new} queries and {n_keys} keys; "
                f"allowed: those of the {self._handed_on} tokens that are new"
            )

    def attended(self, layer: int) -> None:
        """Note that a layer is done with the call, so that it is the next one's turn."""
        self._handed_on, self._turn = None, (layer + 1) % self._n_layers

    def begin(self, cache: Cache, given: Mapping[str, Any]) -> None:
        """Look at what a model is called with, by parameter: this cache, and tokens that go on."""
        if given.get("past_key_values") is not cache:
            found = "none" if given.get("past_key_values") is None else "another"
            raise UserError(
                f"the model is called with {found} in place of the cache of evicting(model, cache); allowed: "
                "past_key_values=cache in every call, which guidance_scale and assistants do not give"
            )
        if given.get("use_cache") is False:
            raise UserError("use_cache is False within evicting(model, cache); allowed: True, or left out")
        if given.get("output_attentions"):
            raise UserError("output_attentions is asked of an evicting model; allowed: False")
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        self.tokens, new = ids, embeds if ids is None else ids
        if new is None or not new.shape[1]:
            raise UserError("the model is called without tokens; allowed: one or more")
        if self._n_rows not in (None, new.shape[0]):
            raise UserError(
                f"a batch of {new.shape[0]} follows one of {self._n_rows} sequences; allowed: the same, "
                "a new cache, or cache.reset()"
            )
        n_seen = cache.get_seq_length()
        in_prompts = self.in_prompts(n_seen)
        if in_prompts or self._reads_values:
            self._require_continuation(in_prompts, n_seen, new.shape, given)
        self._n_rows = new.shape[0]
        # What a graph reads when it is replayed is not seen here.
        if ids is None or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._read = None
        elif self._read is not None:
            self._read.append(ids.detach().clone())

    def begin_text(self, cache: Cache, given: Mapping[str, Any]) -> None:
        """Look at what ``generate`` is called with: this cache, and whole prompts or a text that goes on."""
        if given.get("past_key_values") is not cache:
            raise UserError("generate is called without past_key_values=cache within evicting(model, cache)")
        ids = next((given[name] for name in ("inputs", "input_ids") if given.get(name) is not None), None)
        embeds = given.get("inputs_embeds")
        text = embeds if ids is None else ids
        n_tokens = 1 if text is None else text.shape[1]
        n_seen = cache.get_seq_length()
        if not n_seen:
            if self._told not in (None, n_tokens):
                raise UserError(f"generate brings {n_tokens} tokens; prompt_tokens is {self._told}")
            self.prompt_tokens, self._is_guessed = n_tokens, False
            return
        mask = given.get("attention_mask")
        # Beside the mask of all, the new tokens may come alone.
        is_whole = mask is None or mask.shape[1] != n_seen + n_tokens
        if n_seen == self.prompt_tokens:
            self.require_certain_prompts(n_tokens - n_seen if is_whole else n_tokens)
        self._is_guessed = False
        if not is_whole:
            return
        if n_tokens <= n_seen:
            raise UserError(
                f"generate brings a text of {n_tokens} tokens, and the cache has read {n_seen}; allowed: a "
                "text that goes on, a new cache, or cache.reset()"
            )
        self._require_same(ids, n_seen)

    def in_prompts(self, n_seen: int) -> bool:
        """Say whether a text of so many tokens still lacks some of its prompts."""
        return self.prompt_tokens is None or n_seen < self.prompt_tokens

    def require_part_of_prompts(self, n_seen: int, n_new: int) -> int:
        """Give the length of the prompts, of which a pass is a part.

        Refused if they would end within the pass, or if their length is not known and the pass has but one
        token, perhaps the first of many.
        """
        if self.prompt_tokens is None:
            if n_new == 1:
                raise UserError(
                    "the first pass has one token, and may be the start of longer prompts; allowed: "
                    "EvictingCache(..., prompt_tokens=N), several tokens, or generate"
                )
            self.prompt_tokens, self._is_guessed = n_new, True
        elif n_seen + n_new > self.prompt_tokens:
            raise UserError(
                f"a pass of {n_new} tokens after {n_seen} ends behind the {self.prompt_tokens} tokens of the "
                "prompts; allowed: a pass that ends with them"
            )
        return self.prompt_tokens

    def require_certain_prompts(self, n_new: int) -> None:
        """Refuse several tokens where they may be more of the prompts."""
        if n_new > 1 and self._is_guessed:
            raise UserError(
                f"{n_new} tokens at once follow a first pass of {self.prompt_tokens}, and may be more of the "
                "prompts; allowed: EvictingCache(..., prompt_tokens=N), or generate"
            )

    def _require_continuation(
        self, in_prompts: bool, n_seen: int, shape: Sequence[int], given: Mapping[str, Any]
    ) -> None:
        """Hold masks and positions of new tokens, (n_rows, n_new, ...), against what was read before."""
        mask, positions, n_tokens = given.get("attention_mask"), given.get("position_ids"), n_seen + shape[1]
        known = None if in_prompts else self._lengths
        if known is None:
            self._has_positions = positions is not None
        elif (known < n_seen).any() and (positions is not None) != self._has_positions:
            found = "given" if self._has_positions else "missing"
            raise UserError(
                f"position_ids were {found} when the padded prompts were read; allowed: in all passes or none"
            )
        lengths = np.full(shape[0], n_tokens) if known is None else known + shape[1]
        if isinstance(mask, torch.Tensor):
            if mask.ndim != 2 or mask.shape[1] != n_tokens:
                raise UserError(
                    f"the attention mask has the shape {tuple(mask.shape)}; allowed: a row of {n_tokens} for "
                    "every sequence, the whole text of which the cache has read the start"
                )
            shown = mask.bool().sum(1).cpu().numpy()
            if known is not None and (shown != lengths).any():
                raise UserError("the attention mask hides tokens of the texts; allowed: left-padded prompts")
            lengths = shown
        if isinstance(positions, torch.Tensor) and positions.ndim == 2:
            last = positions[:, -1].cpu().numpy()
            if ((last != lengths - 1) & (lengths > 0)).any():
                raise UserError(
                    f"position_ids end with {last.tolist()[:3]}, texts with {(lengths - 1).tolist()[:3]}; "
                    "allowed: positions that go on, a new cache, or cache.reset()"
                )
        self._lengths = lengths

    def _require_same(self, ids: torch.Tensor | None, n_seen: int) -> None:
        """Hold the start of a text against the ids that were read."""
        read = None if self._read is None else torch.cat(self._read, 1)
        if ids is None or read is None or read.shape != (ids.shape[0], n_seen):
            raise UserError(
                "generate brings a whole text, whose start cannot be held against what the cache has read, "
                f"{self._n_rows} sequences of {n_seen} tokens or embeddings; allowed: the new tokens alone "
                "beside an attention mask of all, a new cache, or cache.reset()"
            )
        differing = (read != ids[:, :n_seen].to(read.device)).any(0).nonzero()
        if len(differing):
            raise UserError(
                f"generate brings another text: it differs from what the cache has read at token "
                f"{int(differing[0])}; allowed: a text that goes on, a new cache, or cache.reset()"
            )


def watch_calls(model: PreTrainedModel, cache: Cache, calls: Calls) -> Callable[[], None]:
    """Look at every call of a model and of its ``generate``; give what ends that."""
    # The model below its head is called by the whole one, and may be called by itself.
    inner = model.base_model
    forward, generate = inspect.signature(inner.forward), cast(Callable[..., Any], model.generate)
    own = "generate" in vars(model)

    def before_forward(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.begin(cache, forward.bind_partial(*given).arguments | named)

    @wraps(generate)
    def watched(*given: Any, **named: Any) -> Any:
        calls.begin_text(cache, inspect.signature(generate).bind_partial(*given).arguments | named)
        return generate(*given, **named)

    handle = inner.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.generate = watched  # type: ignore[assignment]

    def end() -> None:
        handle.remove()
        if own:
            model.generate = generate  # type: ignore[assignment]
        else:
            del model.generate

    return end
