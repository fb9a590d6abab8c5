"""Golden vectors of G-KV's and VaSE's own eviction code, written into the current folder; see README.md.

Usage: ``python make_decoding.py GKV VASE``, checkouts of both. Nothing of them is stored but what they keep.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

N_TOKENS, HEAD_DIM, N_QUERY_HEADS, N_KV_HEADS = 240, 16, 4, 2
Keep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FIRST, STEP, BUDGET, WINDOW = 90, 24, 60, 12


def drawn(seed: int) -> tuple[np.ndarray, ...]:
    """Draw queries, keys and values; every fifth key repeats an earlier one, but for a little noise."""
    rng = np.random.default_rng(seed)
    queries = 1.5 * rng.normal(size=(N_QUERY_HEADS, N_TOKENS, HEAD_DIM))
    keys, values = rng.normal(size=(2, N_KV_HEADS, N_TOKENS, HEAD_DIM))
    for token in range(10, N_TOKENS, 5):
        keys[:, token] = keys[:, rng.integers(token)] + 0.2 * rng.normal(size=(N_KV_HEADS, HEAD_DIM))
    return tuple(own.astype(np.float16) for own in (queries, keys, values))


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compress_all(arrays: tuple[np.ndarray, ...], keep: Keep) -> np.ndarray:
    """Compress whenever STEP tokens came; what is kept each time, int32 (n_times, n_kv_heads, BUDGET)."""
    queries, keys, values = (torch.from_numpy(own.astype(np.float32))[None] for own in arrays)
    held = torch.arange(FIRST).expand(N_KV_HEADS, -1)
    kept = []
    for n_tokens in range(FIRST, N_TOKENS, STEP):
        own = [each[0].gather(1, held[..., None].expand(-1, -1, HEAD_DIM))[None] for each in (keys, values)]
        held = keep(queries[:, :, n_tokens - WINDOW : n_tokens], *own, held)
        kept.append(held.sort(-1).values.numpy().astype(np.int32))
        held = torch.cat([held, torch.arange(n_tokens, n_tokens + STEP).expand(N_KV_HEADS, -1)], 1)
    return np.stack(kept)


def gkv(root: Path, arrays: tuple[np.ndarray, ...], **options: object) -> np.ndarray:
    sys.path.insert(0, str(root))
    from gkv.model.compression.score_based import ScoreBasedKV

    asked = {"budget": BUDGET, "window_size": WINDOW, "enable_score_cache": True, "triton_similarity": False}
    method = ScoreBasedKV(**asked, suppressing_redundancy=True, **options)
    cache = None

    def keep(queries, keys, values, held):
        nonlocal cache
        _, _, positions, cache = method.update_kv(keys, queries, values, held[None], score_cache=cache)
        return positions[0]

    return compress_all(arrays, keep)


def vase(root: Path, arrays: tuple[np.ndarray, ...], smooth: bool) -> np.ndarray:
    module = load("vase_cache", root / "eval/reasoning_tasks/modified/transformers/cache_utils.py")
    asked = {"rkv_lambda": 1.0, "smooth": smooth, "verbose": False, "n_large": BUDGET // 4}
    layer = module.EvictLayer(0, BUDGET, WINDOW, "range_attn", **asked)
    layer.device, layer.dtype = torch.device("cpu"), torch.float32

    def keep(queries, keys, values, held):
        n = keys.shape[2]
        layer.queries = queries
        layer.k_cache = keys.transpose(1, 2).clone()
        layer.v_cache = values.transpose(1, 2).clone()
        layer.cache_seqlens = torch.tensor([n])
        before = layer.v_cache.clone()  # by which what was moved is found again
        layer._run_eviction(n)
        after = layer.v_cache[:, :BUDGET]
        same = (after[0].transpose(0, 1)[:, :, None] == before[0].transpose(0, 1)[:, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        return held.gather(1, same.int().argmax(-1)).sort(-1).values

    return compress_all(arrays, keep)


def main() -> None:
    torch.set_num_threads(1)
    gkv_root, vase_root = map(Path, sys.argv[1:])
    one, other = drawn(21), drawn(22)
    kept = {
        "max": gkv(gkv_root, one, mix_lambda=0.5, alpha=0.8),
        "mean": gkv(gkv_root, one, mix_lambda=0.5, alpha=0.6, smooth_method="mean"),
        "sum": gkv(gkv_root, one, mix_lambda=0.9, alpha=0.8, smooth_method="sum"),
    }
    np.savez_compressed("decoding-gkv.npz", queries=one[0], keys=one[1], **kept)
    kept = {"plain": vase(vase_root, other, smooth=False), "smooth": vase(vase_root, other, smooth=True)}
    np.savez_compressed("decoding-vase.npz", queries=other[0], keys=other[1], values=other[2], **kept)


if __name__ == "__main__":
    main()
