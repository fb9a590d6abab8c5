"""A batch of prompts that tiny models decode under a budget, and without."""

from __future__ import annotations

import torch
from spies import NAME, tiny_waves
from tiny_models import N_TOKEN_IDS

from simulator.policies.language import parse_policy
from validate.eviction.cache import EvictingCache
from validate.eviction.decode import decode

N_NEW = 60
AMPLE = 4000  # a pyramid's last layer gets a twentieth
ENTRIES, LIMITS = [14, 22, 12, 30, 18], [60, 40, 60, 20, 33]
PROMPTS = [
    torch.randint(3, N_TOKEN_IDS, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 17, 9, 30, 12)
]
WAVES = tiny_waves()


def padded(prompts):
    """Pad prompts on the left; give ids, mask and positions."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def generated(model, prompts, n_new=N_NEW, **options):
    """Generate greedily with transformers, without an end; the new tokens of each prompt."""
    ids, mask, _ = padded(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": n_new} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def texts(completions):
    return [completion.token_ids for completion in completions]


def decoded(model, policy, entries=ENTRIES, limits=LIMITS, prompts=PROMPTS, **options):
    """Decode with a wave at hand and, unless told, without an end."""
    policy = parse_policy(policy)
    return decode(
        model, prompts, policy, entries, limits, **{"stop_ids": (), "name": NAME, "waves": WAVES} | options
    )


def new_cache(model, text, entries=AMPLE, **options):
    return EvictingCache(model, parse_policy(text), entries, **{"name": NAME, "waves": WAVES} | options)
