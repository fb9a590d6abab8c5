"""The full cache as transformers itself keeps it: what somebody has who changes nothing."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from validate.bench.clock import Lap
from validate.bench.decode import (
    FULL_AT,
    FULL_STEPS,
    PROMPT_TOKENS,
    WARM_STEPS,
    case_row,
    times_over_text,
)
from validate.models.load import model_shape

LABEL = "full cache, transformers"


@torch.inference_mode()
def measure_stock(model: PreTrainedModel, batch: int, new_tokens: int) -> dict[str, Any]:
    """Time decode steps with transformers' own cache and attention, at the lengths of ``measure``.

    Returns
    -------
    dict
        As ``measure``; without a graph, since this cache grows, and without a plan of its memory.
    """
    points, held = [], 0
    for share in FULL_AT:
        cache = _filled(model, batch, int(PROMPT_TOKENS + share * new_tokens) - WARM_STEPS)
        tokens = torch.zeros(batch, dtype=torch.long, device=model.device)
        lap = Lap(model.device)
        for _ in range(FULL_STEPS):
            output = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1].argmax(-1)
            lap.mark()
        points.append((share, median(lap.seconds()[WARM_STEPS:])))
        layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        held = sum(states.nbytes for own in layers for states in (own.keys, own.values) if states is not None)
    found = times_over_text(points) | {
        "bytes_planned": None,
        "bytes_measured": held,
        "is_captured": False,
        "not_captured": "the cache grows",
        "peak_bytes": None,
    }
    return case_row(LABEL, batch, new_tokens, found, entries=None, graph=False)


def _filled(model: PreTrainedModel, batch: int, n_tokens: int) -> DynamicCache:
    shape, cache = model_shape(model.config, model.dtype), DynamicCache()
    size = (batch, shape.n_kv_heads, n_tokens, shape.head_dim)
    for layer in range(shape.n_layers):
        keys, values = (torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache
