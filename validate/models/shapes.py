"""Shapes of real models, to be filled with random weights: time and memory are theirs, answers are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from traces.errors import UserError

# What the name of a model with random weights begins with, in results as in options.
PREFIX = "random:"
# Of the byte-level tokenizer: the 256 bytes, and behind them these.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_SPECIAL_IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


@dataclass(frozen=True, slots=True)
class RandomShape:
    """The published configuration of ``source`` without its weights.

    ``kind`` is its model type, as transformers calls it, and ``dtype`` the type its weights are stored in.
    """

    source: str
    kind: str
    settings: dict[str, Any]
    dtype: str = "bfloat16"


_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# Biases on queries, keys and values are part of the model type. The window is switched off, as in the source.
_QWEN_14B = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_COMMON = {"tie_word_embeddings": False, "initializer_range": 0.02, "hidden_act": "silu", **_SPECIAL_IDS}

SHAPES = {
    "R1-Llama-8B": RandomShape(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B, of the shape of meta-llama/Llama-3.1-8B",
        "llama",
        _LLAMA_8B | _COMMON,
    ),
    "R1-Qwen-14B": RandomShape(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B, of the shape of Qwen/Qwen2.5-14B",
        "qwen2",
        _QWEN_14B | _COMMON,
    ),
    "AceReason-14B": RandomShape(
        "nvidia/AceReason-Nemotron-14B, trained on from DeepSeek-R1-Distill-Qwen-14B",
        "qwen2",
        _QWEN_14B | _COMMON,
    ),
    "tiny": RandomShape("no model: two layers, for trying things out", "llama", _TINY | _COMMON, "float32"),
}


def find_shape(name: str) -> RandomShape:
    """Give the shape of a name.

    Raises
    ------
    UserError
        For another name.
    """
    if name not in SHAPES:
        raise UserError(f"random weights '{name}' are of no known shape; allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def random_revision(seed: int) -> str:
    """Give what stands for the revision of weights drawn from a seed."""
    return f"seed-{seed}"


Default = TypeVar("Default", str, None)


def asked_model(model: str | None, random_weights: str | None, default: Default) -> str | Default:
    """Settle the model of a run from ``--model`` and ``--random-weights``.

    Raises
    ------
    UserError
        If both are given, or the shape is unknown.
    """
    if random_weights is None:
        return default if model is None else model
    if model is not None:
        raise UserError(
            f"--model {model} and --random-weights {random_weights} are given; allowed: one of them"
        )
    find_shape(random_weights)
    return PREFIX + random_weights


def meaningless(model: str) -> str:
    """Give the line that has to stand under results of a model; empty for weights that were trained."""
    if not model.startswith(PREFIX):
        return ""
    name = model.removeprefix(PREFIX)
    return (
        f"{model}: random weights of the shape {name}; its texts and answers mean nothing, time and memory do"
    )
