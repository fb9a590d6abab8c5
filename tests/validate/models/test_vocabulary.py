"""Pieces of text that tokens stand for."""

import pytest
from tiny_models import byte_tokenizer, marked_tokenizer

from validate.models.vocabulary import vocabulary_of
from validate.reasoner.tokenizer import build_tokenizer


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, marked_tokenizer, build_tokenizer])
def test_vocabulary_pieces_join_to_the_text(make_tokenizer):
    tokenizer = make_tokenizer()
    text = "walk to 3 , naive answer step by step"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = vocabulary_of(tokenizer, ids)
    assert sorted(pieces) == sorted(set(ids))
    joined = "".join(pieces[token] for token in ids)
    assert joined.strip() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def test_part_of_a_character_is_shown_as_replacement():
    tokenizer = byte_tokenizer()
    ids = tokenizer("→ 中", add_special_tokens=False).input_ids
    pieces = vocabulary_of(tokenizer, ids)
    assert "�" in "".join(pieces.values())
    assert vocabulary_of(None, ids) == {}
