"""Small GGUF files, written as llama.cpp's converter writes a Llama, and the model they hold."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NORMAL, CONTROL = 1, 3


def byte_tokens():
    """Give the 256 tokens of one byte, as byte-level vocabularies write them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + n) for n in range(len(hidden))]


def make_gguf(
    path,
    kind="F32",
    *,
    architecture="llama",
    seed=0,
    tied=True,
    tokenizer=True,
    without=(),
    extra=(),
    scaled=False,
):
    """Write a model of two layers, and give it with its random weights rounded as the file has them."""
    kind = GGMLQuantizationType[kind]
    tokens = [*SPECIAL, *byte_tokens(), "ab"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    _add_facts(writer, config, tokens if tokenizer else None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = weight.numpy().copy()
        if array.ndim == 2:
            packed = quants.quantize(array, kind)
            weight.copy_(torch.from_numpy(quants.dequantize(packed, kind).reshape(array.shape).copy()))
            for heads, part in ((4, "q_proj"), (2, "k_proj")):
                if part in name:
                    array = _pairs_apart(array, heads)
            array = quants.quantize(array, kind)
        stored = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        name = names.get_name(name, try_suffixes=(".weight",))
        if name not in without:
            writer.add_tensor(name, array, raw_dtype=stored)
    for name in extra:
        writer.add_tensor(name, np.ones(64, np.float32))
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_facts(writer, config, tokens):
    """Write a model's shape, and its tokenizer if there is one."""
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * 257)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)


def _pairs_apart(weight, heads):
    """Order rows as llama.cpp rotates them: neighbours in pairs, where transformers pairs halves."""
    return (
        weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).astype(np.float32)
    )
