"""The reasoner's tokenizer: one token per blank-separated word, 96 of them."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from validate.reasoner.tasks import DIGITS, NAMES, OPERATORS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = ("walk", "program", "ask", "to", "think", "gives", "answer", ":", ";", ",", ".", "=")
VOCABULARY_SIZE = 96


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; ``save_pretrained`` of the result is what ships with the weights."""
    words = [*SPECIAL, *WORDS, *OPERATORS, *DIGITS, *NAMES]
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
