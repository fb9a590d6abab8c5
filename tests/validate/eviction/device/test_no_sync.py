"""Nothing that a step or a compression needs is asked of the device: run on one that cannot answer.

Tensors on torch's device "meta" have shapes and no data; whoever wants a number of them gets an error.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from simulator.policies.language import parse_policy
from validate.eviction.cache import evicting
from validate.eviction.device import schedule
from validate.eviction.device.cache import DeviceCache
from validate.eviction.device.steps import Steps
from validate.eviction.kernels.ops import torch_ops

ENTRIES, BUFFER, PROMPT_TOKENS = 14, 8, 20


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """Older versions of transformers ask for it by the kind of device, and torch knows none for this one."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", n_kv_heads=2, head_dim=16).to("meta")


def _run(model, text, n_steps, on_step=lambda steps, cache: None):
    cache = DeviceCache(model, parse_policy(text, buffer=BUFFER), ENTRIES, ahead=n_steps, ops=torch_ops())
    ids = torch.zeros(3, PROMPT_TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode(), evicting(model, cache):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        steps = Steps(model, cache)
        for _ in range(n_steps):
            logits = steps.step(ids[:, 0])
            on_step(steps, cache)
    assert logits.device.type == "meta"
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("text", ["fullkv", "snapkv:window=4", "rkv:window=4", "rkv+pyramid:window=4"])
def test_steps_and_compressions_ask_nothing(model, text):
    cache = _run(model, text, 5 * BUFFER)
    assert cache.n_compressions >= 5 or text == "fullkv"
    assert cache.held.shape == (3,)


class _Waits(TorchDispatchMode):
    """Notes every copy between host and device that one waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        output = function(*arguments, **named)
        aten = torch.ops.aten
        if function.overloadpacket in (aten.to, aten._to_copy, aten.copy_):
            kinds = {
                tensor.device.type for tensor in (*arguments, output) if isinstance(tensor, torch.Tensor)
            }
            if len(kinds) > 1 and not named.get("non_blocking"):
                self.found.append(function)
        return output


@pytest.mark.parametrize("text", ["rkv:window=4", "rkv+utility:window=4,delta=1"])
def test_nothing_is_copied_that_is_waited_for(model, text):
    cache = DeviceCache(model, parse_policy(text, buffer=BUFFER), ENTRIES, ahead=9, ops=torch_ops())
    ids = torch.zeros(3, PROMPT_TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode(), evicting(model, cache):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        due = np.ones((2, 3), bool)
        with _Waits() as waits:
            cache.back_end.compress(due)
    assert not waits.found


def test_rows_are_dropped_without_asking(model):
    cache = DeviceCache(model, parse_policy("rkv:window=4", buffer=BUFFER), ENTRIES, ahead=9, ops=torch_ops())
    ids = torch.zeros(3, PROMPT_TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode(), evicting(model, cache):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        steps = Steps(model, cache)
        steps.step(ids[:, 0])
        steps.keep_rows(torch.tensor([0, 2]))
        steps.step(ids[:2, 0])
    assert cache.pool.starts.shape == (2, 2, 2)


class _Answer:
    """What a device is asked for, and when."""

    def __init__(self, asked, number, shape):
        self._asked, self._number, self._shape = asked, number, shape

    def synchronize(self):
        self._asked.append(self._number)

    def numpy(self):
        return np.full(self._shape, 2 * ENTRIES)


@pytest.mark.slow
def test_counts_of_unequal_heads_are_asked_for_a_buffer_later(model, monkeypatch):
    asked, given, at = [], [], []

    def to_host(counts):
        answer = _Answer(asked, len(given), counts.shape)
        given.append(at[-1] if at else 0)
        return answer, answer

    monkeypatch.setattr(schedule, "_to_host", to_host)
    waits = []

    def note(steps, cache):
        at.append(len(at) + 1)
        # Which compressions' counts were waited for in this step, and how many steps ago those were.
        waits.extend(at[-1] - 1 - given[number] for number in asked)
        asked.clear()

    cache = _run(model, "rkv+utility:window=4,delta=1", 4 * BUFFER + 1, note)
    assert cache.n_compressions == 4
    # Both prompts' layers one by one, then all layers at once.
    assert len(waits) == 2 + 3
    assert min(waits) >= BUFFER - 1
