"""The replay and its slow twin tell the same story, compression by compression."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from agreement import agree, replayed
from cases import MODERATE, cases, draw_arrays
from hypothesis import given, settings

from simulator.engine import compression
from simulator.engine import layer as layer_replay
from simulator.policies.heads.adakv import AdaKV
from simulator.policies.layers.cake import Cake
from simulator.policies.layers.wave_dynamic import WaveDynamic
from simulator.policies.scorers.random import Random
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from simulator.policies.triggers.buffer_full import BufferFull
from simulator.policies.triggers.every_n import EveryN

POLICIES = [
    "fullkv",
    "streamingllm:buffer=5",
    "snapkv:buffer=8",
    "snapkv:buffer=3,group_reduce=mean_weights",
    "snapkv:buffer=3,group_reduce=max_weights,slot_order=score",
    "rkv:buffer=8",
    "rkv:buffer=8,slot_order=score,no_match=column0",
    "rkv:trigger=every-n,interval=7,offset=2",
    "rkv:prompt=wait,buffer=3",
    "pyramid-rkv:buffer=8",
    "reasonalloc:buffer=8",
    "reasonalloc:buffer=4,delta=8,pooling=length",
    "rkv+utility:buffer=1,delta=5,mu=0.5",
    "snapkv+pyramid+utility:buffer=4,delta=4",
    "streamingllm+wave:buffer=8",
    "random:buffer=8",
    "random-prompt:buffer=8",
    "random-prompt+utility:buffer=4,delta=8,recent=3",
    "h2o:buffer=1",
    "h2o+utility:buffer=8,delta=8,recent_share=0.2",
    "h2o:prompt=wait,buffer=6,recent_share=0",
    "vatp:buffer=8,sinks=4",
    "vatp+utility:buffer=3,delta=6,sinks=0,recent_share=0.3",
    "tova:buffer=8",
    "tova+utility:buffer=4,delta=4,recent=1",
    "snapkv-paper:buffer=8,window=6",
    "snapkv-paper:buffer=3,window=8,kernel_size=5,pool=avg,slot_order=score",
    "snapkv-paper+utility:buffer=4,delta=8,window=5,kernel_size=3",
    "keydiff:buffer=8",
    "keydiff+pyramid:buffer=4,recent=3",
    "knorm:buffer=8",
    "knorm:trigger=every-n,interval=7,recent=2",
    "lagkv:buffer=8,lag=4",
    "lagkv:buffer=6,lag=5,sinks=2,score_source=keys",
    "lagkv:buffer=5",
    "expected-attention:buffer=8",
    "expected-attention:buffer=8,window=12,n_future=9,sinks=0,epsilon=0.02",
    "expected-attention:buffer=8,window=3,use_covariance=false,use_values=false",
    "criticalkv:buffer=8,window=4",
    "criticalkv+utility:buffer=4,delta=4,window=3,pool=avg,first_stage_share=0.7,slot_order=score",
    "random-unified:buffer=8",
    "random-unified+utility:buffer=4,delta=8,recent=3",
    "gkv:buffer=8,window=5",
    "gkv:buffer=4,window=3,update=mean,decay=0.6,no_match=column0",
    "gkv+utility:buffer=5,delta=5,window=4,update=sum,decay=0.5,alpha=0.9",
    "vase:buffer=8,window=5,sinks=2",
    "vase+pyramid:buffer=4,window=4,sinks=0,large_share=0.5,kernel_size=1",
    "vase+adakv:buffer=4,window=3,sinks=1,sampled=false,kernel_size=3",
    "recency:buffer=8",
    "recency+wave:buffer=8,sinks=1",
    "append-only:buffer=8",
    "append-only:buffer=3,window=3,rate=0.1,slot_order=score",
    "append-only+utility:trigger=every-n,interval=5,delta=10,window=4",
    "rkv+pyramid-code:buffer=8",
    "snapkv+pyramid-code+utility:buffer=4,delta=4,code_beta=3",
    "rkv+wave-dynamic:buffer=4,layer_delta=16",
    "snapkv+wave-dynamic+utility:buffer=3,layer_delta=10,demand_window=3,rho=0.6,delta=5",
    "streamingllm+wave-dynamic:trigger=every-n,interval=6,layer_delta=9,gamma=2,layer_cap=1.5",
    "append-only+wave-dynamic:buffer=4,window=4,layer_delta=7,prompt=wait",
    "snapkv+cake:buffer=5",
    "random+cake+adakv:buffer=4,cake_window=5,tau1=2,tau2=0.5",
    "h2o+wave-dynamic+adakv:buffer=6,layer_delta=8",
    "rkv+squeeze:buffer=8",
    "streamingllm+squeeze:buffer=4,squeeze_share=0.1",
    "rkv+table:buffer=8",
    "random+table+headkv:buffer=8,head_beta=1.5",
    "snapkv+custom:buffer=4,layer_shares=3/0.5/2",
    "rkv+uniform+custom:buffer=5,head_shares=2/1/1.5",
    "recency+custom+custom:buffer=5,layer_shares=2/1/1,head_shares=0.1/1/9",
    "rkv+adakv:buffer=8",
    "snapkv+adakv:buffer=3,form=floor,group_reduce=mean_weights",
    "knorm+adakv:buffer=4,form=floor,uniform_share=0",
    "keydiff+wave+adakv:buffer=4,uniform_share=0.7,recent=3",
    "rkv+headkv:buffer=8",
    "tova+duo:buffer=8",
    "random+wave+duo:buffer=8,streaming_share=0.7,stream_budget=0.4",
    "rkv:trigger=segment,segment=3/5",
    "h2o+utility:trigger=segment,delta=9",
    "snapkv:trigger=per-step",
    "tova+adakv:trigger=per-step",
    "random+utility:trigger=per-step,prompt=wait,delta=6",
]

# With entries of the window among the candidates, more sinks or fewer, and budgets that hold the prompt.
PROTECTED = [
    "rkv:buffer=8,protect=none",
    "rkv:buffer=4,protect=prompt+recent:20",
    "rkv+utility:buffer=4,delta=4,protect=boundary:12.5%",
    "snapkv:buffer=4,protect=prompt+recent:5",
    "snapkv:buffer=3,protect=recent:3,group_reduce=max_weights,slot_order=score",
    "snapkv:buffer=5,protect=sinks:7,group_reduce=mean_weights",
    "snapkv-paper:buffer=5,window=6,protect=sinks:2",
    "criticalkv+pyramid:buffer=4,window=9,protect=boundary:4%+recent:3",
    "append-only:buffer=3,window=4,protect=prompt+recent:9",
    "append-only:buffer=3,window=4,protect=none",
    "lagkv:buffer=4,lag=4,protect=none",
    "lagkv:buffer=4,lag=4,protect=sinks:2+recent:3",
    "expected-attention:buffer=8,window=12,n_future=9,protect=none",
    "random+pyramid+utility:buffer=4,delta=8,protect=prompt",
    "random:buffer=4,prompt=keep,protect=recent:2",
    "h2o+wave:buffer=4,protect=prompt+recent:6",
    "streamingllm:buffer=4,protect=none",
    "gkv:buffer=4,window=8,protect=recent:3",
    "vase:buffer=4,window=8,protect=prompt+recent:2",
]


@pytest.fixture
def make_whole_trace(make_trace):
    """Write a trace that has values, RoPE and the text of its tokens too."""

    def make(n_layers=3, n_kv_heads=3, n_tokens=110, prompt_tokens=31, head_dim=8, **options):
        values = np.random.default_rng(3).normal(size=(n_layers, n_kv_heads, n_tokens, head_dim))
        sizes = {"n_layers": n_layers, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "n_tokens": n_tokens}
        text = {token: "\n" if token in (2, 6) else "x" for token in range(9)}
        known = {"rope": {"rope_theta": 50.0}, "token_ids": np.arange(n_tokens) % 9, "vocabulary": text}
        return make_trace(**sizes, prompt_tokens=prompt_tokens, values=values, **known, **options)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_replay_is_the_twin_on_gaussian_data(policy, make_whole_trace):
    trace = make_whole_trace()
    agreement = agree(trace, policy, 17, demand=[40, 3, 12], seed=5)
    assert not agreement.adopted  # no near-tie: every set, order and budget was equal
    assert agreement.n_decisions > 50 or policy == "fullkv"


@pytest.mark.slow
@pytest.mark.parametrize("policy", PROTECTED)
def test_replay_is_the_twin_whatever_is_protected(policy, make_whole_trace):
    trace = make_whole_trace()
    agreement = agree(trace, policy, 53, demand=[40, 20, 22], seed=5)
    assert not agreement.adopted
    assert agreement.n_decisions > 50


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_replay_is_the_twin_in_every_storage_type(dtype, make_trace):
    trace = make_trace(dtype=dtype, scale=0.2)
    assert not agree(trace, "rkv+utility:buffer=4,delta=4", 12).adopted


def test_replay_is_the_twin_at_large_logits(make_trace, rng):
    # Logits reach 100, where float32 overflows without care and resolves 1e-5 of a weight.
    arrays = 6 * rng.normal(size=(2, 4, 60, 8)), 6 * rng.normal(size=(2, 2, 60, 8))
    trace = make_trace(arrays=arrays)
    assert np.abs(trace.queries(0)[0] @ trace.keys(0)[0].T).max() * trace.scale > 90
    agree(trace, "streamingllm:buffer=5", 17, atol=1e-4)
    outcome, _ = replayed(trace, "rkv:buffer=5", 17)
    assert np.isfinite(outcome.mass).all()


def test_replay_is_the_twin_when_spans_are_measured_in_blocks(make_trace, monkeypatch):
    monkeypatch.setattr(layer_replay, "_BLOCK_TOKENS", 13)
    trace = make_trace(n_tokens=90)
    assert not agree(trace, "snapkv:buffer=33", 20).adopted
    assert not agree(trace, "fullkv", 20).adopted


@pytest.mark.slow
def test_replay_is_the_twin_on_anything(shared_folder):
    account = Counter()

    @settings(MODERATE, max_examples=200)
    @given(cases(dynamic=True))
    def check(case):
        trace = case.write(shared_folder)
        agreement = agree(trace, case.policy, case.entries, demand=case.demand, seed=case.seed % 1000)
        account["decisions"] += agreement.n_decisions
        account[case.kind] += sum(agreement.adopted.values())
        account.update(agreement.adopted)

    check()
    assert account["decisions"] > 2000
    assert account["gaussian"] <= 1
    assert account["repeated"] + account["quantised"] < 0.01 * account["decisions"]


def test_similarities_at_the_threshold_are_near_ties(make_trace):
    # Keys of -1, 0 and 1 have cosines of exactly 0.5, which single precision may round to either side.
    arrays = draw_arrays(np.random.default_rng(1), "quantised", 1, 2, 2, 60, 8)
    agreement = agree(make_trace(arrays=arrays), "rkv:buffer=6", 20)
    assert agreement.adopted["near-tie"] + agreement.adopted["exact tie"] <= 2


def _earlier_tie(scores, positions, n_kept, slot_order):
    return np.sort(np.lexsort((positions, -scores))[:n_kept])


def test_twin_notices_ties_that_go_to_the_earlier_position(make_trace, monkeypatch):
    trace = make_trace()
    monkeypatch.setattr(compression, "select_slots", _earlier_tie)
    assert agree(trace, "snapkv:buffer=8", 17).adopted["exact tie"]  # where none is right, see above


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "broken", "policy"),
    [
        (BufferFull, "buffer", 9, "rkv:buffer=8"),
        (SnapKV, "recent", 7, "snapkv:buffer=8"),
        (RKV, "similarity_threshold", 0.6, "rkv:buffer=8"),
        (EveryN, "offset", 1, "rkv:trigger=every-n,interval=8"),
        (Random, "recent", 9, "random:buffer=8"),
        (AdaKV, "uniform_share", 0.6, "rkv+adakv:buffer=8"),
        (WaveDynamic, "layer_delta", 9, "rkv+wave-dynamic:buffer=4,layer_delta=8,gamma=2"),
        (Cake, "cake_window", 4, "rkv+cake:buffer=4"),
    ],
)
def test_twin_notices_a_changed_rule(owner, name, broken, policy, make_trace, monkeypatch):
    trace = make_trace()
    agree(trace, policy, 17)
    monkeypatch.setattr(owner, name, property(lambda self: broken, lambda self, value: None))
    with pytest.raises(AssertionError):
        agree(trace, policy, 17)
