"""The text of single tokens, so that a trace can show its text without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def n_token_ids(model: PreTrainedModel) -> int:
    """Count the token ids that a model has an embedding of."""
    return cast(int, model.get_input_embeddings().num_embeddings)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | None, token_ids: Iterable[int]) -> dict[int, str]:
    """Give the text of each token id that occurs, such that joining the pieces reads as the text.

    A token that holds only some bytes of a character is shown as the replacement character.
    """
    if tokenizer is None:
        return {}
    return {token: token_text(tokenizer, token) for token in sorted(set(token_ids))}


def whole_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Give the text of every token id, each decoded alone."""
    ids = range(len(tokenizer))
    return dict(enumerate(tokenizer.batch_decode([[token] for token in ids])))


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Give what one token adds to a text, its leading blank included."""
    # Decoders drop the blank before the first token of a text, and put one between whole words:
    # what a second copy adds to a first one is the token's text inside a text.
    once, twice = tokenizer.batch_decode(
        [[token], [token, token]], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return twice[len(once) :] if twice.startswith(once) else once
