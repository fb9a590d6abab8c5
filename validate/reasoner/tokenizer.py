"""The reasoner's tokenizer: one token per blank-separated word, 256 of them."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from validate.problems.families import (
    CAPITALS,
    CARE,
    COUNTS,
    DIGITS,
    FAMILIES,
    LEFT,
    LEGS,
    LINES,
    NAMES,
    RESULTS,
    RIGHT,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = (
    *("legs", "leg", "end", "think", "answer", "goal", "mark", "recap", "check", "ok", "fix", ":", ";", "."),
    *("so", "from", "dead", "loop", "sum", "set", "front", "queue"),
)
VOCABULARY_SIZE = 256


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; ``save_pretrained`` of the result is what ships with the weights."""
    words = [*SPECIAL, *FAMILIES, *WORDS, *CARE, *DIGITS, *NAMES, *CAPITALS]
    words += [*LEFT, *RIGHT, *LEGS, *COUNTS, *RESULTS, *LINES]
    words += [f"<reserved{i}>" for i in range(VOCABULARY_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
