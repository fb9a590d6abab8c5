"""The dense replay a researcher would write in torch: all keys at every step, and a mask of what is left.

Written from the papers; it imports nothing from the simulator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

WINDOW, KERNEL_SIZE, ALPHA, THRESHOLD = 8, 7, 0.1, 0.5


def snapkv(queries, keys, scale):
    """Attention of the window's queries on what came before it, pooled; (heads, n - WINDOW)."""
    candidates = keys[:, :-WINDOW]
    logits = torch.einsum("hgwd,hnd->hgwn", queries, candidates) * scale
    weights = logits.amax(1).softmax(-1).mean(1)
    return F.max_pool1d(weights, KERNEL_SIZE, stride=1, padding=KERNEL_SIZE // 2)


def rkv(queries, keys, scale):
    """Importance less redundancy, as `snapkv`."""
    n = keys.shape[1]
    unit = F.normalize(keys, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).zero_()
    # Every key spares its newest duplicate.
    newest = torch.where(cosines > THRESHOLD, torch.arange(n), -1).amax(-1, keepdim=True)
    cosines = torch.where(torch.arange(n) == newest, 0, cosines)
    redundancy = cosines.mean(1).softmax(-1)
    return ALPHA * snapkv(queries, keys, scale) - (1 - ALPHA) * redundancy[:, :-WINDOW]


SCORES = {"snapkv": snapkv, "rkv": rkv}


@torch.inference_mode()
def replay_layer(queries, keys, scale, prompt_tokens, policy, budget, buffer):
    """Replay one layer: the mass of every decode step, and who is retained after every compression.

    ``queries`` (n_query_heads, n_tokens, head_dim) and ``keys`` (n_kv_heads, n_tokens, head_dim) are float32.
    Gives (n_query_heads, n_steps), and a list of (n_tokens, (n_kv_heads, budget) positions in time order).
    """
    n_kv_heads, total_tokens, head_dim = keys.shape
    queries = queries.reshape(n_kv_heads, -1, total_tokens, head_dim)
    retained = torch.zeros(n_kv_heads, total_tokens, dtype=torch.bool)
    retained[:, :prompt_tokens] = True
    mass, compressions = [], []

    def compress(n_tokens):
        positions = retained.nonzero()[:, 1].reshape(n_kv_heads, -1)
        held = keys.gather(1, positions[..., None].expand(-1, -1, head_dim))
        scores = SCORES[policy](queries[:, :, n_tokens - WINDOW : n_tokens], held, scale)
        # Ties go to the later position; the window stays.
        ranked = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, : budget - WINDOW]
        kept = positions.gather(1, scores.shape[1] - 1 - ranked)
        kept = torch.cat([kept, positions[:, -WINDOW:]], 1).sort(1).values
        retained.zero_().scatter_(1, kept, True)
        compressions.append((n_tokens, kept))

    n_held = prompt_tokens
    if n_held > budget:
        compress(prompt_tokens)
        n_held = budget
    for token in range(prompt_tokens, total_tokens):
        retained[:, token] = True
        n_held += 1
        logits = queries[:, :, token] @ keys[:, : token + 1].transpose(1, 2) * scale
        weights = logits.softmax(-1)
        mass.append((weights * retained[:, None, : token + 1]).sum(-1).flatten())
        if n_held == budget + buffer and token + 1 < total_tokens:
            compress(token + 1)
            n_held = budget
    return torch.stack(mass, 1), compressions


def replay(trace, policy, budget, buffer):
    """Replay every layer of an opened trace, one after the other; a list of what `replay_layer` gives."""
    return [
        replay_layer(
            torch.from_numpy(trace.queries(layer)),
            torch.from_numpy(trace.keys(layer)),
            trace.scale,
            trace.prompt_tokens,
            policy,
            budget,
            buffer,
        )
        for layer in range(trace.shape.n_layers)
    ]
