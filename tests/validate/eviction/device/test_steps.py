"""What the host does around CUDA graphs, with graphs that a CPU replays: they compute at a replay only."""

from __future__ import annotations

import pytest
import torch
from spies import NAME, tiny_waves
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.eviction.cache import evicting
from validate.eviction.device.cache import DeviceCache
from validate.eviction.device.steps import Steps
from validate.eviction.kernels.ops import torch_ops
from validate.models import load as models

N_STEPS, DROP_AT, BUFFER = 40, 17, 8
PROMPTS = torch.randint(3, N_TOKEN_IDS, (3, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", n_kv_heads=2, seed=2, head_dim=16)


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for what ``Steps`` wants of CUDA; what goes wrong during a capture may be set."""

    class Cuda:
        """Holds the pools of graphs that are there, and errors to be raised."""

        pools, error, error_at_end, n_captured = set(), None, None, 0

        class CUDAGraph:
            def __init__(self):
                self.steps = cuda.steps

            def __del__(self):
                cuda.pools.discard(id(self))

            def pool(self):
                return id(self)

            def replay(self):
                steps = self.steps
                cache, n_seen = steps._cache, steps._cache.get_seq_length()
                cache.back_end.keeps_time = False
                steps.logits.copy_(steps._forward())
                cache.back_end.keeps_time = True
                for layer in cache.layers:
                    layer.count(n_seen - layer.get_seq_length())

        class graph:
            def __init__(self, graph, pool=None):
                assert pool is None or pool in cuda.pools, "the pool of a graph that is gone"
                self._graph = graph

            def __enter__(self):
                cache = cuda.steps._cache
                self._state = cache.n_tokens, cache.pool.lengths, cache.back_end.ring
                self._before = [tensor.clone() for tensor in self._state]
                if cuda.error:
                    raise cuda.error

            def __exit__(self, *_):
                for tensor, before in zip(self._state, self._before, strict=True):
                    tensor.copy_(before)
                if cuda.error_at_end:
                    raise cuda.error_at_end
                cuda.pools.add(id(self._graph))
                cuda.n_captured += 1

    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Cuda.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Cuda.graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return cuda


def _cache(model, text, ahead=N_STEPS):
    given = {"name": NAME, "waves": tiny_waves(), "ops": torch_ops()}
    return DeviceCache(model, parse_policy(text, buffer=BUFFER), 14, ahead=ahead, **given)


def _steps(model, cuda, cache, wants_graph=True):
    cuda.steps = Steps(model, cache)
    cuda.steps._wants_graph = wants_graph
    return cuda.steps


def _write(model, cuda, text, wants_graph):
    cache = _cache(model, text)
    written = []
    with torch.inference_mode(), evicting(model, cache):
        logits = model(input_ids=PROMPTS, past_key_values=cache, use_cache=True).logits[:, -1]
        steps = _steps(model, cuda, cache, wants_graph)
        for number in range(N_STEPS):
            tokens = logits.argmax(-1)
            if number == DROP_AT:
                rows = torch.tensor([0, 2])
                steps.keep_rows(rows)
                tokens = tokens[rows]
            logits = steps.step(tokens)
            written.append((tokens.tolist(), cache.held.tolist(), cache.get_seq_length()))
    return written, cache.n_compressions, steps


@pytest.mark.parametrize("text", ["fullkv", "rkv:window=4", "reasonalloc:window=4"])
def test_replays_write_what_forward_passes_do(model, cuda, text):
    written, n_compressions, steps = _write(model, cuda, text, True)
    assert steps.is_captured
    assert cuda.n_captured == 2
    expected, n_expected, _ = _write(model, cuda, text, False)
    assert (written, n_compressions) == (expected, n_expected)


@pytest.mark.parametrize("at_end", [False, True])
def test_steps_that_cannot_be_captured_are_forward_passes(model, cuda, at_end):
    expected, *_ = _write(model, cuda, "reasonalloc:window=4", False)
    setattr(cuda, "error_at_end" if at_end else "error", RuntimeError("not permitted\nwhile capturing"))
    written, _, steps = _write(model, cuda, "reasonalloc:window=4", True)
    assert written == expected
    assert not steps.is_captured
    assert steps.not_captured == "not permitted while capturing"


def test_ropes_that_ask_the_device_are_not_captured(cuda):
    _, _, steps = _write(tiny_model("llama", rope="dynamic", head_dim=16), cuda, "rkv:window=4", True)
    assert "dynamic" in steps.not_captured
    assert not cuda.n_captured


def test_a_full_device_is_no_reason_to_go_on(model, cuda):
    cuda.error_at_end = RuntimeError("the capture is void")
    cuda.error_at_end.__context__ = torch.OutOfMemoryError("full")
    with pytest.raises(RuntimeError, match="the capture is void"):
        _write(model, cuda, "rkv:window=4", True)


def test_a_token_without_room_is_refused_before_it_is_captured(model, cuda):
    cache = _cache(model, "fullkv", ahead=1)
    with torch.inference_mode(), evicting(model, cache):
        model(input_ids=PROMPTS, past_key_values=cache, use_cache=True)
        steps = _steps(model, cuda, cache)
        steps.step(PROMPTS[:, 0])
        for _ in range(2):
            with pytest.raises(UserError, match="laid out for 1 tokens"):
                steps.step(PROMPTS[:, 0])
    assert [layer.get_seq_length() for layer in cache.layers] == [21, 21]
    assert not cuda.n_captured


def test_kernels_are_launched_where_the_model_is(model, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(type(model), "to", lambda self, device: done.append("placed") or self)
    for device in ("cpu", "cuda", "cuda:1"):
        models._place(model, torch.device(device), "tiny")
    assert done == ["placed", "placed", "cuda:1", "placed"]
