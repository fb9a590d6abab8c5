"""Golden vectors of kvpress's own presses, written into the current folder; README.md says what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

N_TOKENS, ROPE_THETA = 80, 10000.0
ADAKV_RATIOS = (0.5, 0.7)
SNAPKV = {"window_size": 8, "kernel_size": 5}
SCORERS = {
    "knorm": kvpress.KnormPress(),
    "keydiff": kvpress.KeyDiffPress(),
    "tova": kvpress.TOVAPress(),
    "lagkv": kvpress.LagKVPress(n_sink=4, lag_size=16),
    "expected-attention": kvpress.ExpectedAttentionPress(),
    "expected-attention-plain": kvpress.ExpectedAttentionPress(use_covariance=False, use_vnorm=False),
    "snapkv": kvpress.SnapKVPress(**SNAPKV),
    "observed-attention": kvpress.ObservedAttentionPress(),
    "criticalkv": kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=0.5, **SNAPKV)),
}
ADAPTIVE = {
    "adakv": kvpress.AdaKVPress(kvpress.KnormPress(), alpha_safeguard=0.2),
    "adakv-snapkv": kvpress.AdaKVPress(kvpress.SnapKVPress(**SNAPKV), alpha_safeguard=0.2),
}


class Prefill:
    """One prompt through one attention layer: what the hooks hand to a press, and the arrays to be stored.

    Hidden states are multiples of 1/16, weights of 1/32, so that every projection is exact in float32 and the
    queries stored are the presses' own, whichever rows they project together.
    """

    def __init__(self) -> None:
        config = LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_hidden_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            attn_implementation="eager",
        )
        rng = np.random.default_rng(0)

        def sixteenths(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy((np.round(array * 16) / 16).astype(np.float32))

        self.module = LlamaAttention(config, layer_idx=0).eval()
        for linear in (self.module.q_proj, self.module.k_proj, self.module.v_proj, self.module.o_proj):
            linear.weight.data = sixteenths(rng.normal(0, 0.1, linear.weight.shape))
        self.module.k_proj.weight.data[:16] /= 2  # two KV heads with keys of unlike lengths
        self.module.k_proj.weight.data[16:] *= 2
        self.module.rotary_emb = LlamaRotaryEmbedding(config)

        shared, noise = rng.normal(size=64), rng.normal(size=(N_TOKENS, 64))
        lengths = np.exp(rng.normal(0, 0.5, (N_TOKENS, 1)))
        lengths[0] = 6  # an outlier, as first tokens are
        self.hidden = sixteenths(lengths * (0.7 * shared + noise))[None]
        rotary = self.module.rotary_emb(self.hidden, torch.arange(N_TOKENS)[None])
        self.kwargs = {"position_embeddings": rotary}

        cache, future = DynamicCache(), torch.full((N_TOKENS, N_TOKENS), -torch.inf).triu(1)
        _, self.attentions = self.module(self.hidden, rotary, future[None, None], cache)
        self.keys, self.values = cache.layers[0].keys, cache.layers[0].values
        config._attn_implementation = "sdpa"  # AdaKV refuses the eager one

        unrotated = self.module.q_proj(self.hidden).view(1, N_TOKENS, -1, 16).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(unrotated, self.keys, *rotary)
        self.arrays = {
            "queries": queries[0].numpy(),
            "keys": self.keys[0].numpy(),
            "values": self.values[0].numpy(),
            "scale": np.float64(self.module.scaling),
            "rope_theta": np.float64(ROPE_THETA),
        }

    def ask(self, method: Callable, observed: bool = False) -> Any:
        """Call a press's score or compress; with no attention weights unless told, as under SDPA."""
        attentions = self.attentions if observed else None
        return method(self.module, self.hidden, self.keys, self.values, attentions, self.kwargs)

    def kept(self, press: kvpress.AdaKVPress, ratio: float) -> np.ndarray:
        """Return what AdaKV's own selection leaves unmasked at a compression ratio."""
        press.compression_ratio = ratio
        self.ask(press.compress)
        mask = np.ones(self.keys.shape[1:3], bool)
        _, heads, slots = self.module.masked_key_indices
        mask[heads, slots] = False
        return mask


def parameters(press: kvpress.BasePress) -> dict[str, np.ndarray]:
    """Return a press's parameters, its inner press's before its own."""
    own = dict(vars(press))
    inner = own.pop("press", None)
    return (parameters(inner) if inner else {}) | {name: np.array(value) for name, value in own.items()}


@torch.inference_mode()
def main() -> None:
    """Write one file per press."""
    torch.set_num_threads(1)
    prefill = Prefill()
    files = {}
    for name, press in SCORERS.items():
        scores = prefill.ask(press.score, observed=name == "observed-attention")[0].numpy()
        files[name] = parameters(press) | {"scores": scores}
    for name, press in ADAPTIVE.items():
        files[name] = parameters(press) | {
            "scores": prefill.ask(press.press.score)[0].numpy(),
            "compression_ratio": np.array(ADAKV_RATIOS),
            "kept": np.stack([prefill.kept(press, ratio) for ratio in ADAKV_RATIOS]),
        }
    files["criticalkv"]["output_weight"] = prefill.module.o_proj.weight.numpy()
    for name, arrays in files.items():
        np.savez_compressed(f"kvpress-{name}.npz", **prefill.arrays, **arrays)


if __name__ == "__main__":
    main()
