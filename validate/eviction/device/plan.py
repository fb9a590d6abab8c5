"""What a device's cache takes: which policies, and how much memory."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from simulator.policies.heads.uniform import UniformHeads
from simulator.policies.heads.utility import UtilityHeads
from simulator.policies.language import Policy
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from simulator.policies.triggers.buffer_full import BufferFull
from validate.eviction.kernels.ops import takes_heads
from validate.models.load import model_shape


def unsupported_part(policy: Policy) -> str | None:
    """Name the part of a policy that only the host can carry out, if there is one."""
    if not policy.evicts:
        return None
    scorer, heads, trigger = policy.scorer, policy.heads, policy.trigger
    if type(scorer) not in (SnapKV, RKV):
        return f"scorer '{scorer.name}'"
    for name, done in (("group_reduce", "max_logits"), ("slot_order", "chronological"), ("no_match", "skip")):
        if getattr(scorer, name, done) != done:
            return f"{name}={getattr(scorer, name)}"
    if type(heads) is not UniformHeads and type(heads) is not UtilityHeads:
        return f"head allocator '{heads.name}'"
    if isinstance(heads, UtilityHeads) and heads.pooling != "none":
        return f"pooling={heads.pooling}"
    if policy.layers.dynamic:
        return f"layer allocator '{policy.layers.name}'"
    if type(trigger) is not BufferFull:
        return f"trigger '{trigger.name}'"
    if policy.protect is not None:
        return f"protect={policy.protect}"
    if trigger.prompt != "compress":
        return f"prompt={trigger.prompt}"
    return "redistribute=True" if policy.redistribute else None


def serves(model: PreTrainedModel, policy: Policy) -> bool:
    """Say whether a device's cache can take this policy and this model."""
    shape = model_shape(model.config, model.dtype)
    group_size = shape.n_query_heads // shape.n_kv_heads
    return takes_heads(shape.head_dim, group_size) and unsupported_part(policy) is None


def buffer_of(policy: Policy) -> int:
    """Give the entries that a KV head takes in between two compressions; 0 for a full cache."""
    return policy.trigger.buffer if isinstance(policy.trigger, BufferFull) else 0


def memory_plan(
    policy: Policy, entries: np.ndarray, prompts: np.ndarray, ahead: int, n_kv_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tell how much memory a cache takes before it is made.

    Parameters
    ----------
    policy : Policy
    entries : int64 (n_layers, n_rows)
        Budgets per KV head.
    prompts : int64 (n_rows,)
    ahead : int
        Tokens to be decoded at most.
    n_kv_heads : int

    Returns
    -------
    stretches : int64 (n_layers, n_rows)
        Slots of each layer and sequence.
    longest : int64 (n_layers,)
        Entries that one KV head can come to hold at most.
    """
    if not policy.evicts:
        most = np.broadcast_to(prompts + ahead, entries.shape)
        return most * n_kv_heads, most.max(1)
    # Heads that are short after a compression give the others time, rounded up to whole tokens.
    stretches = n_kv_heads * (entries + buffer_of(policy)) + n_kv_heads - 1
    heads, spare = policy.heads, entries + buffer_of(policy) + 1
    if isinstance(heads, UtilityHeads) and heads.head_cap > 1:
        lowest = np.maximum(sum(policy.protection.ends(0, 0)), np.ceil(heads.mu * entries).astype(np.int64))
        highest = np.maximum(np.ceil(heads.head_cap * entries), entries).astype(np.int64)
        return stretches, np.minimum(stretches, highest + spare - np.minimum(lowest, entries)).max(1)
    return stretches, spare.max(1)
