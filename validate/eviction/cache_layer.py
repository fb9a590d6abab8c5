"""What transformers sees of one layer of an evicting cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from traces.errors import UserError
from validate.eviction.back_end import Heads


class EvictingCacheLayer(CacheLayerMixin):
    """A cache of true length that hands on the new tokens only; attention stores them.

    Attributes
    ----------
    passes : list of Heads
        Those of prompts that are not whole yet, one for each pass.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def lazy_initialization(self, *states: torch.Tensor) -> None:
        """Nothing is set up before attention has seen the prompt."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and hand them on to attention, which stores them."""
        self.count(key_states.shape[2])
        return key_states, value_states

    def count(self, n_tokens: int) -> None:
        """Count tokens that attention has stored or is about to."""
        self._n_seen += n_tokens

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Give the length of a mask over the whole history, and its offset."""
        # Up to 5.16 the positions of the queries are given instead of their number.
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self._n_seen + query_length, 0

    def get_seq_length(self) -> int:
        """Give the tokens of the history, padding included; evicted or not."""
        return self._n_seen

    def get_max_length(self) -> int:
        """Give -1: there is no longest history."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.passes: list[Heads] = []
        self._n_seen = 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to leave out rows whose prompts are not whole; what is held is not here."""
        if self.passes:
            raise UserError("rows cannot be left out before their prompts are whole; allowed: after them")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse: beams would have to share entries."""
        raise UserError("an evicting cache cannot follow a beam search; allowed: greedy decoding, sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse, as beams."""
        raise UserError(f"an evicting cache cannot be repeated {repeats} times; allowed: repeated prompts")

    def crop(self, *_: object, **__: object) -> None:
        """Refuse: what was evicted does not come back."""
        # What is given, the tokens to keep or those to drop, depends on the version.
        raise UserError("an evicting cache cannot give tokens back; allowed: a new cache")
