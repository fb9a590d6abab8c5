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
        return write_trace(path, *self.arrays(), prompt_tokens=self.prompt_tokens, overwrite=True)


@st.composite
def scorers(draw) -> tuple[str, dict, int]:
    """Draw a scorer's name, its parameters and how many entries it protects."""
    name = draw(st.sampled_from(["streamingllm", "snapkv", "rkv", "rkv", "random", "random-prompt"]))
    if name == "streamingllm":
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
def cases(draw, kinds=KINDS) -> Case:
    n_layers, n_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_tokens = draw(st.integers(20, 120))
    scorer, parameters, protected = draw(scorers())
    parts = [scorer]
    layers = draw(st.sampled_from(["", "pyramid", "wave"]))
    if layers:
        parts.append(layers)
    if draw(st.booleans()):
        parts.append("utility")
        parameters |= {
            "delta": draw(st.integers(1, 40)),
            "mu": draw(st.sampled_from([0.0, 0.25, 1.0])),
            "pooling": draw(st.sampled_from(["none", "length"])),
        }
    if draw(st.booleans()):
        parameters["buffer"] = draw(st.integers(1, 32))
    else:
        parameters |= {
            "trigger": "every-n",
            "interval": draw(st.integers(1, 32)),
            "offset": draw(st.integers(0, 3)),
        }
    # A pyramid whose last layer gets a twentieth of too little gets nothing, and cannot be divided.
    least = 20 if layers == "pyramid" and protected == 0 else protected + 1
    parameters["prompt"] = draw(st.sampled_from(["compress", "wait"]))
    return Case(
        kind=draw(st.sampled_from(kinds)),
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        group_size=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(4, 16)),
        n_tokens=n_tokens,
        prompt_tokens=draw(st.integers(1, n_tokens - 1)),
        policy="+".join(parts) + ":" + ",".join(f"{key}={value}" for key, value in parameters.items()),
        entries=draw(st.integers(least, max(least, n_tokens // 2)) | st.just(n_tokens + 3)),
        demand=tuple(draw(st.lists(st.integers(0, 500), min_size=n_layers, max_size=n_layers))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
