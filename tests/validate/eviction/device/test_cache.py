"""The cache on a device decides as the one on the host does, which decides as the simulator does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from spies import NAME, tiny_waves
from tiny_models import N_TOKEN_IDS, tiny_model

from simulator.policies.language import parse_policy
from traces.errors import UserError
from validate.eviction.cache import EvictingCache, evicting
from validate.eviction.decode import decode
from validate.eviction.device.cache import DeviceCache
from validate.eviction.device.plan import memory_plan, unsupported_part
from validate.eviction.device.steps import Steps
from validate.eviction.kernels.ops import torch_ops, triton_ops

POLICIES = [
    "fullkv",
    "snapkv:window=4",
    "rkv:window=4",
    "rkv+pyramid:window=4",
    "rkv+utility:window=4,delta=1",
    "rkv+utility:window=4,delta=20,beta=1,mu=0.1",
    "reasonalloc:window=4",
    "rkv:window=3,kernel_size=1,alpha=0.5,similarity_threshold=0.2",
]
N_NEW, BUFFER = 70, 8
ENTRIES = [14, 22, 12]
PROMPTS = [
    torch.randint(3, N_TOKEN_IDS, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 31, 12)
]
WAVES = tiny_waves()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", n_kv_heads=2, seed=2, head_dim=16).to(DEVICE)


def _read(model, cache, prompts):
    """Read left-padded prompts; give the logits after each."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    on_device = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    return model(past_key_values=cache, use_cache=True, **on_device).logits[:, -1]


def _held_on_device(cache, layer, row):
    starts, lengths = cache.pool.starts[layer, row].tolist(), cache.pool.lengths[layer, row].tolist()
    return [
        cache.pool.positions[start : start + length].tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


def _held_on_host(cache, layer, row):
    pool = cache.evicting_layers[layer].pool
    return [pool.positions[pool.segment(row, head)].tolist() for head in range(pool.lengths.shape[1])]


def _caches(model, text, prompts, entries, ops):
    policy = parse_policy(text, buffer=BUFFER)
    settings = {"name": NAME, "waves": WAVES}
    host = EvictingCache(model, policy, entries, **settings)
    return host, DeviceCache(model, policy, entries, ahead=N_NEW, ops=ops, **settings)


def _decode_both(model, text, prompts=PROMPTS, entries=ENTRIES, n_new=N_NEW, ops=None, drop_at=None):
    """Feed both caches the host's greedy text, and compare what they hold after every token."""
    host, device = _caches(model, text, prompts, entries, ops)
    n_compressed = 0
    with torch.inference_mode():
        with evicting(model, host):
            logits = _read(model, host, prompts)
        with evicting(model, device):
            torch.testing.assert_close(_read(model, device, prompts), logits, atol=2e-5, rtol=1e-4)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        for number in range(n_new):
            if number == drop_at:
                rows = torch.tensor([0, 2])
                host.batch_select_indices(rows), device.batch_select_indices(rows)
                logits, lengths = logits[rows.to(logits.device)], lengths[rows]
            tokens = logits.argmax(-1)
            given = {"input_ids": tokens[:, None], "position_ids": lengths[:, None].to(DEVICE)}
            with evicting(model, host):
                logits = model(past_key_values=host, use_cache=True, **given).logits[:, -1]
            with evicting(model, device):
                found = model(past_key_values=device, use_cache=True, **given).logits[:, -1]
            lengths = lengths + 1
            torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-4)
            np.testing.assert_array_equal(device.held, host.held)
            for layer in range(len(host.layers)):
                for row in range(len(lengths)):
                    assert _held_on_device(device, layer, row) == _held_on_host(host, layer, row), number
        n_compressed = device.n_compressions
    return host, device, n_compressed


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES)
def test_what_is_held_and_written_is_the_same_token_by_token(model, text):
    _, device, n_compressed = _decode_both(model, text)
    assert n_compressed == 0 if text == "fullkv" else n_compressed > 3
    assert device.get_seq_length() == max(map(len, PROMPTS)) + N_NEW


@pytest.mark.slow
@pytest.mark.parametrize("text", ["fullkv", "reasonalloc:window=4"])
def test_rows_can_be_dropped(model, text):
    _decode_both(model, text, drop_at=25)


@pytest.mark.slow
def test_heads_shorter_than_their_budgets_put_compressions_off(model):
    text = "rkv+utility:window=2,delta=1,beta=3,mu=0.1,head_cap=2"
    _, device, _ = _decode_both(model, text, prompts=[[5] * 9], entries=40, n_new=150)
    assert len(set(device.pool.lengths.flatten().tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["rkv:window=4", "reasonalloc:window=4"])
def test_the_kernels_decide_the_same(model, text):
    pytest.importorskip("triton")
    _, _, n_compressed = _decode_both(
        model, text, prompts=[PROMPTS[1]], entries=14, n_new=20, ops=triton_ops()
    )
    assert n_compressed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in POLICIES if text != "fullkv"])
def test_memory_is_planned(model, text):
    _, device, _ = _decode_both(model, text, n_new=30)
    plan, longest = memory_plan(
        device.policy,
        device.schedule.totals // 2,
        np.array([len(prompt) for prompt in PROMPTS]),
        N_NEW,
        2,
    )
    assert device.bytes_allocated == plan.sum() * 2 * 16 * device.pool.keys.element_size()
    assert (device.pool.lengths.amax((1, 2)).cpu().numpy() <= longest).all()


def test_steps_feed_the_model_what_a_loop_does(model):
    policy = parse_policy("rkv:window=4", buffer=BUFFER)
    written = []
    with torch.inference_mode():
        for through_steps in (False, True):
            cache = DeviceCache(model, policy, 14, ahead=N_NEW)
            with evicting(model, cache):
                tokens = _read(model, cache, PROMPTS).argmax(-1)
                steps, text = Steps(model, cache), []
                for _ in range(30):
                    if through_steps:
                        tokens = steps.step(tokens).argmax(-1)
                    else:
                        positions = cache.n_tokens[:, None].long()
                        given = {"input_ids": tokens[:, None], "position_ids": positions}
                        tokens = model(past_key_values=cache, **given).logits[:, -1].argmax(-1)
                    text.append(tokens.tolist())
            written.append(text)
    assert written[0] == written[1]
    assert steps.is_captured == (DEVICE == "cuda")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("h2o", "scorer 'h2o'"),
        ("rkv:group_reduce=mean_weights", "group_reduce=mean_weights"),
        ("rkv-code", "slot_order=score"),
        ("rkv+adakv", "head allocator 'adakv'"),
        ("rkv+utility:pooling=length", "pooling=length"),
        ("rkv+cake", "layer allocator 'cake'"),
        ("rkv:trigger=every-n", "trigger 'every-n'"),
        ("rkv:prompt=keep", "prompt=keep"),
        ("rkv:protect=prompt+recent:8", "protect=prompt+recent:8"),
        ("rkv:redistribute=true", "redistribute=True"),
    ],
)
def test_what_only_the_host_does_is_refused_by_name(model, text, part):
    assert unsupported_part(parse_policy(text)) == part
    with pytest.raises(UserError, match="decided on the host only"):
        DeviceCache(model, parse_policy(text), 100, ahead=1, ops=torch_ops())


def test_heads_of_another_width_are_refused():
    narrow = tiny_model("llama", n_kv_heads=2, head_dim=24)
    with pytest.raises(UserError, match="head_dim is 24; the GPU kernels allow 16, 32, 64, 128"):
        DeviceCache(narrow, parse_policy("rkv"), 100, ahead=1)


def test_a_full_cache_ends_where_its_memory_ends(model):
    cache = DeviceCache(model, parse_policy("fullkv"), 1, ahead=2)
    with torch.inference_mode(), evicting(model, cache):
        _read(model, cache, [[4, 5]])
        steps, tokens = Steps(model, cache), torch.tensor([3], device=DEVICE)
        for _ in range(2):
            steps.step(tokens)
        with pytest.raises(UserError, match="laid out for 2 tokens"):
            steps.step(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["fullkv", "rkv:window=4", "reasonalloc:window=4"])
def test_decoding_writes_the_same_whichever_cache_it_takes(model, text):
    policy = parse_policy(text, buffer=BUFFER)
    written = [
        decode(
            model, PROMPTS, policy, ENTRIES, [60, 9, 33], stop_ids=[2], name=NAME, waves=WAVES, on_device=on
        )
        for on in (False, True)
    ]
    assert written[0] == written[1]
    assert max(len(own.token_ids) for own in written[0]) > 30
