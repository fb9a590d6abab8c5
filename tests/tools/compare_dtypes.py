"""How often a full budget writes what transformers does, by dtype: ``python tests/tools/compare_dtypes.py``.

In 16 bits two implementations of attention round differently, and some greedy texts part; stock sdpa against
stock eager shows how many part without an evicting cache. Models are tiny, of random weights, and undecided
more often than a trained one.
"""

from __future__ import annotations

import argparse

import torch
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from validate.eviction.cache import EvictingCache, evicting

PAIRS = (("ours", "sdpa"), ("ours", "eager"), ("eager", "sdpa"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=60)
    asked = parser.parse_args()
    print(f"{'model':<8}{'dtype':<10}{'texts':>6}" + "".join(f"{' = '.join(pair):>14}" for pair in PAIRS))
    for kind in ("llama", "qwen3"):
        for dtype in ("float32", "bfloat16", "float16"):
            model = tiny_model(kind, dtype=dtype, seed=2)
            written = {"sdpa": [], "eager": [], "ours": []}
            for seed in range(asked.texts):
                generator = torch.Generator().manual_seed(seed)
                ids = torch.randint(3, N_TOKEN_IDS, (1, 20), generator=generator)
                options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": asked.tokens}
                for implementation in ("sdpa", "eager"):
                    model.set_attn_implementation(implementation)
                    written[implementation].append(model.generate(ids, **options).tolist())
                cache = EvictingCache(model, parse_policy("fullkv"), 1)
                with evicting(model, cache):
                    written["ours"].append(model.generate(ids, past_key_values=cache, **options).tolist())
            equal = [
                sum(mine == theirs for mine, theirs in zip(written[one], written[other], strict=True))
                for one, other in PAIRS
            ]
            print(f"{kind:<8}{dtype:<10}{asked.texts:>6}" + "".join(f"{n:>14}" for n in equal), flush=True)


if __name__ == "__main__":
    main()
