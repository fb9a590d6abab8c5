"""The kernels of ``validate.eviction.kernels`` in torch: same arguments, same results, on any device.

Segments are padded to the longest, which the host knows a bound of, so that no shape depends on what is on
the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of one padded block: 64 MiB of float32.
_BLOCK_ELEMENTS = 2**24


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    longest: int,
) -> None:
    """Compute ``kernels.attention.attend``; ``longest`` bounds ``lengths``."""
    n_segments, head_dim = len(starts), keys.shape[1]
    grouped, mixed = queries.view(n_segments, -1, head_dim), output.view(n_segments, -1, head_dim)
    if not longest:
        output.zero_()
        return
    for block in blocks(n_segments, longest * head_dim):
        index, held = slots_of(starts[block], lengths[block], longest)
        logits = (grouped[block].float() * scale) @ keys[index].float().transpose(1, 2)
        logits = logits.masked_fill_(~held[:, None], -torch.inf)
        # A segment without entries has no weights; slots that are not held may hold anything.
        weights = logits.softmax(-1).masked_fill_(~held[:, None], 0.0)
        mixed[block] = (weights @ values[index].float().masked_fill_(~held[:, :, None], 0.0)).to(output.dtype)


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    new_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    n_tokens: torch.Tensor,
    ring: torch.Tensor | None,
) -> None:
    """Compute ``kernels.append.append``."""
    n_rows, n_kv_heads, head_dim = new_keys.shape
    slots = starts + lengths
    keys[slots] = new_keys.reshape(-1, head_dim)
    values[slots] = new_values.reshape(-1, head_dim)
    positions[slots] = n_tokens.repeat_interleave(n_kv_heads, output_size=len(slots))
    lengths += 1
    if ring is not None and ring.shape[2]:
        rows = torch.arange(n_rows, device=ring.device)
        ring[rows, :, n_tokens % ring.shape[2]] = new_queries


def select(
    scores: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    quotas: torch.Tensor,
    survivors: torch.Tensor,
    kept: torch.Tensor,
    *,
    longest: int,
) -> None:
    """Compute ``kernels.selection.select``; ``longest`` bounds ``lengths``."""
    torch.minimum(lengths, quotas, out=kept)
    slots = torch.arange(longest, dtype=torch.int32, device=scores.device)
    for block in blocks(len(starts), longest):
        index, held = slots_of(starts[block], lengths[block], longest)
        # Score and slot in one number: no two are equal, and of equal scores the later slot is larger.
        ranks = _image(scores[index]).long() * 2**32 + slots
        ranks = torch.where(held, ranks, torch.iinfo(torch.int64).min)
        ordered = ranks.sort(1, descending=True).values
        threshold = ordered.gather(1, (kept[block, None].long() - 1).clamp(min=0))
        survives = held & (ranks >= threshold) & (kept[block, None] > 0)
        places = starts[block, None] + survives.cumsum(1) - 1
        put(survivors, places, slots.expand(places.shape), survives)


def demand(
    scores: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    totals: torch.Tensor,
    counts: torch.Tensor,
    *,
    n_kv_heads: int,
    longest: int,
) -> None:
    """Compute ``kernels.selection.demand``; ``longest`` bounds ``lengths``."""
    if not longest:
        counts.zero_()
        return
    bounds = torch.iinfo(torch.int32)
    for block in blocks(len(totals), n_kv_heads * longest):
        own = slice(block.start * n_kv_heads, block.stop * n_kv_heads)
        index, held = slots_of(starts[own], lengths[own], longest)
        # No score has the smallest image, nor the largest.
        images = _image(scores[index]).masked_fill_(~held, bounds.min)
        pooled = images.view(-1, n_kv_heads * longest)
        rank = totals[block, None].long().clamp(1, pooled.shape[1]) - 1
        threshold = pooled.sort(1, descending=True).values.gather(1, rank)
        threshold = threshold.masked_fill_(totals[block, None] <= 0, bounds.max)
        reaches = pooled >= threshold
        counts[own] = (reaches.view(held.shape) & held).sum(1, dtype=torch.int32)


def compact(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    survivors: torch.Tensor,
    starts: torch.Tensor,
    kept: torch.Tensor,
    new_starts: torch.Tensor,
    *,
    n_kv_heads: int,
) -> None:
    """Compute ``kernels.compaction.compact``, through a copy of a part of the columns at a time."""
    slots = torch.arange(len(positions), device=positions.device)
    # The last segment that begins at a slot or before it; if several begin there, the one that is not empty.
    order = (new_starts * 2 + (kept > 0)).argsort()
    found = torch.searchsorted(new_starts[order], slots, right=True) - 1
    segment = order[found.clamp(min=0)]
    entry = slots - new_starts[segment]
    arrives = (found >= 0) & (entry < kept[segment])
    source = torch.where(arrives, starts[segment] + entry, slots)
    source = torch.where(arrives, starts[segment] + survivors[source], slots)
    positions.copy_(positions[source])
    for columns in blocks(keys.shape[1], len(keys)):
        keys[:, columns] = keys[:, columns][source]
        values[:, columns] = values[:, columns][source]


def fill(
    source_keys: torch.Tensor,
    source_values: torch.Tensor,
    source_starts: torch.Tensor,
    survivors: torch.Tensor | None,
    survivor_starts: torch.Tensor,
    kept: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    *,
    longest: int,
) -> None:
    """Compute ``kernels.compaction.fill``."""
    for block in blocks(len(starts), longest * keys.shape[1]):
        target, survives = slots_of(starts[block], kept[block], longest)
        relative = torch.arange(longest, device=keys.device).expand(target.shape)
        if survivors is not None:
            index = survivor_starts[block, None] + relative
            relative = survivors[index.clamp(max=len(survivors) - 1)].long()
        source = torch.where(survives, source_starts[block, None] + relative, 0)
        put(keys, target, source_keys[source], survives)
        put(values, target, source_values[source], survives)
        put(positions, target, relative.to(positions.dtype), survives)


def blocks(n: int, elements: int) -> Iterator[slice]:
    """Divide 0 to n into slices, at most ``_BLOCK_ELEMENTS`` in each; none of nothing."""
    step = max(1, _BLOCK_ELEMENTS // max(1, elements))
    return (slice(first, min(n, first + step)) for first in range(0, n if elements > 0 else 0, step))


def slots_of(starts: torch.Tensor, lengths: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each entry's slot, int64 (n_segments, longest), 0 for none, and whether there is one."""
    relative = torch.arange(longest, device=starts.device)
    held = relative < lengths[:, None]
    return torch.where(held, starts[:, None] + relative, 0), held


def _image(scores: torch.Tensor) -> torch.Tensor:
    """Give int32 in the order of the scores; zeros are equal, whatever their sign."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def put(target: torch.Tensor, index: torch.Tensor, source: torch.Tensor, valid: torch.Tensor) -> None:
    """Write ``source`` at ``index`` where ``valid``, without asking how many are; all of one shape in front.

    All others repeat a valid one, or what is in slot 0 if there is none: whoever comes last, the result is
    the same.
    """
    index, valid, source = index.reshape(-1), valid.reshape(-1), source.reshape(-1, *target.shape[1:])
    spare = valid.to(torch.int8).argmax(0, keepdim=True)
    is_valid = valid[spare]
    spare_index = torch.where(is_valid, index[spare], 0)
    columns = (slice(None),) + (None,) * (target.dim() - 1)
    spare_source = torch.where(is_valid[columns], source[spare], target[:1])
    target[torch.where(valid, index, spare_index)] = torch.where(valid[columns], source, spare_source)
