"""Random traces and policies for property tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from traces import write_trace

# The same examples on every run and every machine, however busy.
MODERATE = settings(max_examples=60, deadline=None, derandomize=True, database=None)

KINDS = ("gaussian", "repeated", "quantised")


def draw_arrays(rng, kind, n_layers, n_query_heads, n_kv_heads, n_tokens, head_dim):
    """Draw queries and keys; ``repeated`` copies half of the keys from earlier tokens, ``quantised`` ties."""
    query_shape = (n_layers, n_query_heads, n_tokens, head_dim)
    key_shape = (n_layers, n_kv_heads, n_tokens, head_dim)
    if kind == "quantised":
        return rng.integers(-1, 2, query_shape) * 1.0, rng.integers(-1, 2, key_shape) * 1.0
    queries, keys = rng.normal(size=query_shape), rng.normal(size=key_shape)
    if kind == "repeated":
        for token in range(1, n_tokens):
            if rng.random() < 0.5:
                keys[:, :, token] = keys[:, :, rng.integers(token)]
    return queries, keys


@dataclass(frozen=True)
class Case:
    """A trace to be written, and a policy and budget for it."""

    kind: str
    n_layers: int
    n_kv_heads: int
    group_size: int
    head_dim: int
    n_tokens: int
    prompt_tokens: int
    policy: str
    entries: int
    demand: tuple[int, ...]
    seed: int

    def arrays(self):
        sizes = (
            self.n_layers,
            self.n_kv_heads * self.group_size,
            self.n_kv_heads,
            self.n_tokens,
            self.head_dim,
        )
        return draw_arrays(np.random.default_rng(self.seed), self.kind, *sizes)

    def write(self, directory):
        path = directory / "case.kvtrace"
        queries, keys = self.arrays()
        rng = np.random.default_rng([self.seed, 1])
        quantised = self.kind == "quantised"
        values = rng.integers(-2, 3, keys.shape) * 1.0 if quantised else rng.normal(size=keys.shape)
        extra = {"values": values, "rope": {"rope_theta": 50.0}}
        return write_trace(path, queries, keys, prompt_tokens=self.prompt_tokens, overwrite=True, **extra)


_WINDOW = {
    "window": st.integers(1, 9),
    "kernel_size": st.sampled_from([1, 3, 7]),
    "slot_order": st.sampled_from(["chronological", "score"]),
}
_POOLED = _WINDOW | {"pool": st.sampled_from(["max", "avg"])}
_SINKS, _RECENT = {"sinks": st.integers(0, 5)}, {"recent": st.integers(0, 4)}
_SHARE = {"recent_share": st.sampled_from([0.0, 0.5, 0.7, 1.0])}
_TRUTH = st.sampled_from(["true", "false"])
# What a scorer's parameters may be; a window is protected, except that of expected attention.
UNPROTECTED = ("expected-attention",)
OTHER_SCORERS = {
    "h2o": _SHARE,
    "vatp": _SHARE | _SINKS,
    "tova": _RECENT,
    "snapkv-paper": _POOLED,
    "criticalkv": _POOLED
    | {"first_stage_share": st.sampled_from([0.0, 0.5, 0.8]), "epsilon": st.sampled_from([0.0, 1e-4, 0.1])},
    "gkv": {
        "window": st.integers(1, 9),
        "decay": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        "update": st.sampled_from(["max", "mean", "sum"]),
        "alpha": st.sampled_from([0.1, 0.5, 1.0]),
    },
    "vase": _SINKS
    | {
        "window": st.integers(1, 9),
        "large_share": st.sampled_from([0.0, 0.25, 0.9]),
        "kernel_size": st.sampled_from([1, 5]),
        "sampled": _TRUTH,
    },
    "keydiff": _RECENT,
    "knorm": _RECENT,
    "lagkv": _SINKS | {"lag": st.integers(3, 9), "score_source": st.sampled_from(["both", "keys"])},
    "expected-attention": _SINKS
    | {
        "window": st.integers(1, 40),
        "n_future": st.integers(1, 20),
        "use_covariance": _TRUTH,
        "use_values": _TRUTH,
        "epsilon": st.sampled_from([0.0, 0.01]),
    },
    "append-only": _WINDOW
    | {
        "rate": st.sampled_from([0.05, 0.25, 1.0]),
        "group_reduce": st.sampled_from(["max_logits", "mean_weights", "max_weights"]),
    },
}


@st.composite
def scorers(draw, only=None) -> tuple[str, dict, int]:
    """Draw a scorer's name, its parameters and how many entries it protects."""
    known = ["streamingllm", "snapkv", "rkv", "rkv", "random", "random-prompt", "random-unified"]
    name = only or draw(st.sampled_from([*known, "recency", *OTHER_SCORERS]))
    if name in OTHER_SCORERS:
        parameters = {key: draw(values) for key, values in OTHER_SCORERS[name].items()}
        recent = parameters.get("recent", 0 if name in UNPROTECTED else parameters.get("window", 0))
        return name, parameters, parameters.get("sinks", 0) + recent
    if name in ("streamingllm", "recency"):
        sinks = draw(st.integers(0, 5))
        return name, {"sinks": sinks}, sinks
    if name.startswith("random"):
        recent = draw(st.integers(0, 9))
        return name, {"recent": recent}, recent
    parameters = {
        "window": draw(st.integers(1, 9)),
        "kernel_size": draw(st.sampled_from([1, 3, 7])),
        "group_reduce": draw(st.sampled_from(["max_logits", "mean_weights", "max_weights"])),
        "slot_order": draw(st.sampled_from(["chronological", "score"])),
    }
    if name == "rkv":
        parameters |= {
            "alpha": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
            # Small whole numbers have cosines of exactly 0.5, but none of these.
            "similarity_threshold": draw(st.sampled_from([0.07, 0.53, 0.91])),
            "no_match": draw(st.sampled_from(["skip", "column0"])),
        }
    return name, parameters, parameters["window"]


@st.composite
def cases(draw, kinds=KINDS, scorer=None, dynamic=False) -> Case:
    """Draw a case; with ``dynamic`` also such whose layers cannot be followed one by one."""
    n_layers, n_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_tokens = draw(st.integers(20, 120))
    scorer, parameters, protected = draw(scorers(scorer))
    parts = [scorer]
    fixed = ["", "pyramid", "wave", "pyramid-code"]
    layers = draw(st.sampled_from([*fixed, "wave-dynamic", "cake"] if dynamic else fixed))
    if layers:
        parts.append(layers)
    if layers == "wave-dynamic":
        parameters |= {"layer_delta": draw(st.integers(0, 30)), "demand_window": draw(st.integers(1, 9))}
    if layers == "cake":
        parameters |= {"cake_window": draw(st.integers(2, 40)), "tau1": draw(st.sampled_from([0.5, 1.0]))}
    heads = draw(st.sampled_from(["", "", "utility", "adakv"]))
    if heads:
        parts.append(heads)
    if heads == "adakv":
        parameters |= {
            "form": draw(st.sampled_from(["blend", "floor"])),
            "uniform_share": draw(st.sampled_from([0.0, 0.2, 1.0])),
        }
    if heads == "utility":
        parameters |= {
            "delta": draw(st.integers(1, 40)),
            "mu": draw(st.sampled_from([0.0, 0.25, 1.0])),
            "pooling": draw(st.sampled_from(["none", "length"])),
        }
    trigger = draw(st.sampled_from(["buffer-full", "buffer-full", "every-n", "per-step"]))
    if trigger == "buffer-full":
        parameters["buffer"] = draw(st.integers(1, 32))
    elif trigger == "per-step":
        parameters["trigger"] = trigger
    else:
        parameters |= {
            "trigger": "every-n",
            "interval": draw(st.integers(1, 32)),
            "offset": draw(st.integers(0, 3)),
        }
    # A pyramid whose last layer gets a twentieth of too little gets nothing, and cannot be divided.
    uneven = layers.startswith("pyramid") or layers == "cake"
    least = 20 if uneven and protected == 0 else protected + 1
    parameters["prompt"] = draw(st.sampled_from(["compress", "compress", "wait", "keep"]))
    prompt_tokens = draw(st.integers(1, n_tokens // 3 if parameters["prompt"] == "keep" else n_tokens - 1))
    if parameters["prompt"] == "keep":
        least += prompt_tokens
    return Case(
        kind=draw(st.sampled_from(kinds)),
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        group_size=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(4, 16)),
        n_tokens=n_tokens,
        prompt_tokens=prompt_tokens,
        policy="+".join(parts) + ":" + ",".join(f"{key}={value}" for key, value in parameters.items()),
        entries=draw(st.integers(least, max(least, n_tokens // 2)) | st.just(n_tokens + 3)),
        demand=tuple(draw(st.lists(st.integers(0, 500), min_size=n_layers, max_size=n_layers))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
