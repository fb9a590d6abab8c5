"""Ways to call a tiny model around its evicting cache."""

from __future__ import annotations

import torch
from spies import NAME, tiny_waves
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.eviction.cache import EvictingCache
from validate.eviction.device.cache import DeviceCache
from validate.eviction.kernels.ops import torch_ops

N_PROMPT, N_NEW, AMPLE, TIGHT = 50, 24, 4000, 24
SETTINGS = {"name": NAME, "waves": tiny_waves()}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": N_NEW}
KINDS = ["llama", "qwen3", "gemma3_text"]
CACHES = {
    "host": lambda model, policy="rkv:buffer=6", entries=AMPLE, **given: EvictingCache(
        model, parse_policy(policy), entries, **SETTINGS, **given
    ),
    "device": lambda model, policy="rkv:buffer=6", entries=AMPLE, **given: DeviceCache(
        model, parse_policy(policy), entries, ahead=2 * N_NEW, ops=torch_ops(), **SETTINGS, **given
    ),
}


def ids_of(seed, n=N_PROMPT, n_rows=1):
    return torch.randint(3, N_TOKEN_IDS, (n_rows, n), generator=torch.Generator().manual_seed(seed))


PROMPT, OTHER = ids_of(1), ids_of(2)


def made(kind, seed=2):
    return tiny_model(kind, seed=seed, head_dim=16)  # the least that a device's kernels take


def generate(model, ids, **options):
    given = {"attention_mask": torch.ones_like(ids)} | GREEDY | options
    return model.generate(input_ids=ids, **given)[:, ids.shape[1] :].tolist()


def loop(model, ids, cache, n_new=N_NEW, chunk=N_PROMPT, **given):
    """Decode by hand, the prompt in passes of ``chunk`` tokens."""
    written = []
    with torch.inference_mode():
        for part in ids.split(chunk, 1):
            logits = model(input_ids=part, past_key_values=cache, **given).logits
        while len(written) < n_new:
            written.append(logits[:, -1].argmax(-1))
            logits = model(input_ids=written[-1][:, None], past_key_values=cache, **given).logits
    return torch.stack(written, 1).tolist()


def outcome(call):
    """Give what a call wrote, or the one line in which it was refused."""
    try:
        return call()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return line
