"""Causal attention that also gives every query's log-sum-exp, without holding all its weights."""

from __future__ import annotations

import torch

BLOCK_LOGITS = 2**24  # float32 logits that the blocked path holds at once: 64 MiB


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last tokens of a sequence to all keys up to their own.

    Parameters
    ----------
    queries : Tensor, shape (n_query_heads, n_tokens, head_dim)
    keys, values : Tensor, shape (n_kv_heads, n_entries, head_dim)
        ``n_entries >= n_tokens``; query i sees entries 0 to ``n_entries - n_tokens + i``.
    scale : float
        Factor on every dot product.

    Returns
    -------
    output : Tensor, shape (n_query_heads, n_tokens, head_dim), dtype of ``queries``
    lse : Tensor, shape (n_query_heads, n_tokens), float32
    """
    if queries.device.type == "cpu" and has_cpu_flash():
        return flash_attention(queries, keys, values, scale)
    return blocked_attention(queries, keys, values, scale)


def has_cpu_flash() -> bool:
    """Tell whether torch has its CPU kernel that returns the log-sum-exp; it is private."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def flash_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``causal_attention`` with torch's fused CPU kernel."""
    n_query_heads, n_tokens, head_dim = queries.shape
    n_kv_heads, n_entries, _ = keys.shape
    # KV heads become the batch axis and a group shares its keys through a stride of zero: grouped
    # heads without a copy, also in torch versions whose kernel does not know them.
    grouped = queries.unflatten(0, (n_kv_heads, -1))  # (n_kv_heads, group_size, n_tokens, head_dim)
    shared = (n_kv_heads, grouped.shape[1], n_entries, head_dim)
    mask = None
    if 1 < n_tokens < n_entries:
        # The kernel's causal flag lines up first query and first key, not the last of each.
        hidden = torch.ones(n_tokens, n_entries, dtype=torch.bool).triu_(n_entries - n_tokens + 1)
        mask = queries.new_zeros(n_tokens, n_entries).masked_fill_(hidden, -torch.inf)[None, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped,
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        0.0,
        n_tokens == n_entries,
        attn_mask=mask,
        scale=scale,
    )
    return output.reshape(queries.shape), lse.reshape(n_query_heads, n_tokens)


def blocked_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    block_logits: int = BLOCK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``causal_attention`` by float32 products over blocks of queries, on any device."""
    n_query_heads, n_tokens, _ = queries.shape
    n_kv_heads, n_entries, _ = keys.shape
    grouped = queries.unflatten(0, (n_kv_heads, -1))
    all_keys, all_values = keys.float().transpose(1, 2), values.float()
    block = max(1, block_logits // (n_query_heads * n_entries))
    outputs, sums = [], []
    for start in range(0, n_tokens, block):
        rows = grouped[:, :, start : start + block].float()  # (n_kv_heads, group_size, n_rows, head_dim)
        n_rows = rows.shape[2]
        seen = n_entries - n_tokens + start + n_rows  # later entries are hidden from the whole block
        logits = torch.matmul(rows.flatten(1, 2), all_keys[:, :, :seen]).mul_(scale)
        logits = logits.unflatten(1, (-1, n_rows))  # (n_kv_heads, group_size, n_rows, seen)
        hidden = torch.ones(n_rows, n_rows, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., seen - n_rows :].masked_fill_(hidden, -torch.inf)
        sums.append(logits.logsumexp(-1))
        weights = logits.sub_(sums[-1].unsqueeze(-1)).exp_()
        mixed = torch.matmul(weights.flatten(1, 2), all_values[:, :seen])
        outputs.append(mixed.unflatten(1, (-1, n_rows)))
    output = torch.cat(outputs, 2).flatten(0, 1).to(queries.dtype)
    return output, torch.cat(sums, 2).flatten(0, 1)
