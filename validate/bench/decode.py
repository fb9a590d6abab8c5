"""Decode steps at real shapes: their latency, what a compression costs, and the memory they take."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from traces.errors import NoDeviceError
from validate.bench.clock import Lap, synchronize
from validate.eviction.cache import evicting
from validate.eviction.device.cache import DeviceCache
from validate.eviction.device.plan import buffer_of
from validate.eviction.device.schedule import Schedule
from validate.eviction.device.steps import Steps, is_out_of_memory

PROMPT_TOKENS = 16
# Steps before anything is timed: one is compiled, one captured.
WARM_STEPS = 3
# Most steps of a cycle have to be without a compression.
LEAST_BUFFER = 4
# A full cache's steps are timed where so much of the text is written.
FULL_AT = (1 / 8, 1 / 2, 1.0)
FULL_STEPS = 24
_CYCLES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One policy, called ``label`` in the results, at one batch size, writing one length of text.

    ``entries`` is the mean budget per KV head; with ``graph``, steps are replayed from a CUDA graph.
    """

    label: str
    policy: Policy
    batch: int
    new_tokens: int
    entries: int
    graph: bool = True


@torch.inference_mode()
def measure(model: PreTrainedModel, case: Case, waves: dict[str, Wave] | None = None) -> dict[str, Any]:
    """Time decode steps of one case.

    A cache under a budget is timed until every layer of every sequence has compressed twice, which is its
    steady state; a full cache at three lengths, between which the time of a step is taken as linear. What is
    held is noise: no kernel's time depends on it, but the head budgets do.

    Returns
    -------
    dict
        The case; ``step_seconds`` (mean over the text), ``tokens_per_second``, ``compression_seconds`` (of
        all layers and sequences; None for a full cache), ``bytes_planned`` and ``bytes_measured`` of keys
        and values, ``entries_planned`` and ``entries_measured`` (peaks, over layers and KV heads of one
        sequence), ``peak_bytes`` of everything on the device, ``is_captured``, and ``not_captured``: why it
        is not.

    Raises
    ------
    NoDeviceError
        When it does not fit.
    """
    device = model.device
    cache = DeviceCache(
        model,
        case.policy,
        case.entries,
        ahead=case.new_tokens + FULL_STEPS,
        name="bench",
        waves=waves,
    )
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with evicting(model, cache):
            found = _timed(model, cache, case)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NoDeviceError(
            f"{case.label} at batch {case.batch} does not fit into the memory of device '{device}'; "
            "allowed: a smaller batch"
        ) from error
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    entries = case.entries if case.policy.evicts else None
    row = case_row(case.label, case.batch, case.new_tokens, found, entries=entries, graph=case.graph)
    return row | {"peak_bytes": peak}


def case_row(
    label: str, batch: int, new_tokens: int, found: dict[str, Any], *, entries: int | None, graph: bool
) -> dict[str, Any]:
    """Return the fields of ``measure``, but for its peak, by the times and sizes that were found."""
    return {
        "policy": label,
        "batch": batch,
        "new_tokens": new_tokens,
        "without_graph": not graph,
        "entries": entries,
        "tokens_per_second": batch / found["step_seconds"],
        **found,
    }


def _timed(model: PreTrainedModel, cache: DeviceCache, case: Case) -> dict[str, Any]:
    prompts = torch.zeros(case.batch, PROMPT_TOKENS, dtype=torch.long, device=model.device)
    model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    steps = Steps(model, cache, graph=case.graph)
    time_steps = _steady if case.policy.evicts else _growing
    slots = int(cache.pool.stretches.sum())
    return time_steps(steps, cache, prompts[:, 0], case) | {
        "bytes_planned": 2 * slots * cache.shape.head_dim * cache.pool.keys.element_size(),
        "bytes_measured": cache.pool.bytes_taken,
        "is_captured": steps.is_captured,
        "not_captured": steps.not_captured,
    }


def _steady(steps: Steps, cache: DeviceCache, tokens: torch.Tensor, case: Case) -> dict[str, Any]:
    buffer = buffer_of(case.policy)
    # The first compression, which compiles kernels, comes with the last warm step.
    entries = stand_at(cache, case.new_tokens // 2, ahead=WARM_STEPS)
    for _ in range(WARM_STEPS):
        tokens = steps.step(tokens).argmax(-1)
    done = cache.schedule.n_compressions + _CYCLES
    lap, due = Lap(cache.n_tokens.device), []
    # Heads that are short after a compression put the next one off, each layer's and sequence's by itself.
    for number in range(2 * _CYCLES * buffer):
        before = cache.n_compressions
        tokens = steps.step(tokens).argmax(-1)
        lap.mark()
        if cache.n_compressions > before:
            due.append(number)
        if (cache.schedule.n_compressions >= done).all():
            break
    times = lap.seconds()
    usual = median(seconds for number, seconds in enumerate(times) if number not in due)
    return {
        "step_seconds": mean(times),
        "plain_step_seconds": usual,
        "compression_seconds": sum(times[number] - usual for number in due) / _CYCLES,
        "entries_planned": _most_planned(cache, entries + buffer),
        "entries_measured": _most_held(steps, cache, tokens, buffer),
    }


def _most_planned(cache: DeviceCache, per_head: np.ndarray) -> int:
    """Give what a row may hold at most; heads that were short give whole tokens more."""
    n_kv_heads = cache.shape.n_kv_heads
    rounding = n_kv_heads - 1 if cache.policy.heads.delta else 0
    return int((per_head * n_kv_heads + rounding).sum())


def _most_held(steps: Steps, cache: DeviceCache, tokens: torch.Tensor, buffer: int) -> int:
    """Go on for a cycle, untimed, and ask the device how many entries a row held at most."""
    most = cache.pool.lengths.sum((0, 2)).max()
    for _ in range(buffer):
        tokens = steps.step(tokens).argmax(-1)
        most = torch.maximum(most, cache.pool.lengths.sum((0, 2)).max())
    # A step attends after its own token has come.
    return int(most) + cache.pool.lengths.shape[0] * cache.shape.n_kv_heads


def _growing(steps: Steps, cache: DeviceCache, tokens: torch.Tensor, case: Case) -> dict[str, Any]:
    points = []
    for share in FULL_AT:
        n_tokens = int(PROMPT_TOKENS + share * case.new_tokens) - WARM_STEPS
        stand_at(cache, n_tokens)
        for _ in range(WARM_STEPS):
            tokens = steps.step(tokens).argmax(-1)
        lap = Lap(cache.n_tokens.device)
        for _ in range(FULL_STEPS - WARM_STEPS):
            tokens = steps.step(tokens).argmax(-1)
            lap.mark()
        points.append((share, median(lap.seconds())))
    held = int(cache.held.max())
    return times_over_text(points) | {"entries_planned": held, "entries_measured": held}


def times_over_text(points: list[tuple[float, float]]) -> dict[str, Any]:
    """Give the fields of ``measure`` that tell a full cache's times, by step times at shares of a text."""
    return {
        "step_seconds": mean_over_text(points),
        "plain_step_seconds": points[-1][1],
        "compression_seconds": None,
        "steps_at": [{"share": share, "seconds": seconds} for share, seconds in points],
    }


def mean_over_text(points: list[tuple[float, float]]) -> float:
    """Average step times given at shares of a text, linear between the shares and before the first."""
    (first, early), (second, later) = points[:2]
    at_start = max(0.0, early - first * (later - early) / (second - first))
    shares, times = zip(*[(0.0, at_start), *points], strict=True)
    steps = zip(np.diff(shares), times[:-1], times[1:], strict=True)
    return float(sum(width * (before + after) / 2 for width, before, after in steps))


def stand_at(cache: DeviceCache, n_tokens: int, ahead: int = 0) -> np.ndarray:
    """Let a cache stand as if its rows had written so many tokens; noise is what it holds.

    With ``ahead``, the next compression comes after so many tokens, if there is one.

    Returns
    -------
    int64 (n_layers, 1)
        Budgets per KV head, of one row.
    """
    policy, pool, n_kv_heads = cache.policy, cache.pool, cache.shape.n_kv_heads
    for block in (pool.keys, pool.values):
        block.normal_()
    pool.positions.zero_()
    entries = cache.schedule.totals // n_kv_heads
    n_rows = entries.shape[1]
    per_head = np.full(entries.shape, n_tokens)
    if policy.evicts:
        per_head = np.minimum(entries + buffer_of(policy) - ahead, n_tokens)
    pool.lengths.copy_(torch.from_numpy(per_head[:, :, None].astype(np.int32)).expand(pool.lengths.shape))
    cache.n_tokens.fill_(n_tokens)
    prompts = np.full(n_rows, n_tokens)
    cache.back_end.schedule = Schedule(policy, entries, prompts, n_kv_heads, held=per_head * n_kv_heads)
    synchronize(cache.n_tokens.device)
    return entries[:, :1]
