"""Random-weight models and tokenizers small enough to build in a test."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Models of this size gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)

N_TOKEN_IDS = 96
TEXT = "let us walk step by step: 3 × 4 = 12, naïve → answer. Let us walk again, step by step!"

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def tiny_model(kind="llama", n_kv_heads=2, rope="default", dtype="float32", seed=0, **settings):
    """Build a 2-layer model whose attention is sharp enough for its greedy text to vary."""
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": N_TOKEN_IDS,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": n_kv_heads,
            "head_dim": 16 if kind == "qwen3" else 8,  # a width of its own: not hidden_size / heads
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "rope_parameters": dict(ROPES[rope]),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        },
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


def byte_tokenizer(**settings):
    """Train a byte-level BPE tokenizer on one sentence: some characters are split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", **settings
    )


def marked_tokenizer():
    """Train a BPE tokenizer that marks blanks with a low bar, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
