"""`check_trace` passes what is right and finds what is wrong, above all an LSE over other keys."""

import naive_traces as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import TraceError, causal_lse, check_trace, open_trace, write_trace


@pytest.mark.slow
@given(
    n_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    n_tokens=st.integers(1, 700),
    start=st.integers(0, 600),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_causal_lse_matches_float64(n_kv_heads, group_size, head_dim, n_tokens, start, spread, seed):
    start = min(start, n_tokens - 1)
    rng = np.random.default_rng(seed)
    n_heads = n_kv_heads * group_size
    queries = spread * rng.standard_normal((n_heads, n_tokens, head_dim), dtype=np.float32)
    keys = spread * rng.standard_normal((n_kv_heads, n_tokens, head_dim), dtype=np.float32)
    found = causal_lse(queries[:, start:], keys, 0.3, start)
    assert found.dtype == np.float32
    logits = 0.3 * queries.astype(float) @ np.repeat(keys, group_size, 0).astype(float).swapaxes(1, 2)
    for token in range(start, n_tokens):
        expected = np.logaddexp.reduce(logits[:, token, : token + 1], axis=1)
        error = np.abs(found[:, token - start] - expected)
        assert (error <= 2e-5 * (1 + np.abs(logits).max())).all()


@pytest.mark.parametrize(("spread", "largest"), [(0.5, 8), (30.0, 1000)])
def test_causal_lse_holds_over_several_key_blocks_and_large_logits(spread, largest):
    rng = np.random.default_rng(0)
    queries = spread * rng.standard_normal((1, 2100, 4), dtype=np.float32)
    keys = spread * rng.standard_normal((1, 2100, 4), dtype=np.float32)
    found = causal_lse(queries, keys, 1.0)
    logits = queries[0].astype(float) @ keys[0].astype(float).T
    for token in range(0, 2100, 7):
        expected = np.logaddexp.reduce(logits[token, : token + 1])
        assert found[0, token] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert np.abs(found).max() > largest


def test_causal_lse_refuses_keys_of_another_length():
    queries, keys = np.ones((4, 5, 8), np.float32), np.ones((2, 6, 8), np.float32)
    assert causal_lse(queries, keys, 1.0, start=1).shape == (4, 5)
    for wrong in (keys[:, :5], np.ones((3, 6, 8), np.float32), np.ones((2, 6, 7), np.float32)):
        with pytest.raises(ValueError, match=r"allowed: \(n_kv_heads, 6, 8\)"):
            causal_lse(queries, wrong, 1.0, start=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_good_trace_passes_with_five_facts(tmp_path, dtype):
    trace = naive.small_trace(tmp_path / "t.kvtrace", dtype=dtype, n_tokens=200)
    facts = check_trace(trace, samples=100, seed=3)
    assert len(facts) == 5
    assert "agrees with its digest" in facts[0]
    assert "3 files" in facts[1]
    assert "100 log-sum-exps agree" in facts[4]
    assert "all 1600 log-sum-exps agree" in check_trace(trace, samples=None)[4]


@pytest.mark.slow
def test_the_sample_grows_with_the_trace(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=6400, n_layers=3)
    assert "300 log-sum-exps agree" in check_trace(trace, samples=64)[4]  # one of 64 tokens, in each layer


def test_one_wrong_lse_anywhere_is_found_by_checking_all(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=300)
    path = trace.path / "layer_001.safetensors"
    content = bytearray(path.read_bytes())
    at = trace.layouts[path.name]["lse"].start + 4 * (2 * 300 + 137)
    content[at : at + 4] = np.float32(np.frombuffer(content[at : at + 4], "<f4")[0] + 1).tobytes()
    path.write_bytes(content)
    naive.reseal(trace.path)
    check_trace(open_trace(trace.path), samples=0)
    with pytest.raises(TraceError, match="lse of query head 2, token 137"):
        check_trace(open_trace(trace.path), samples=None)


def shifted_lse(trace, layer, offset):
    """Return the LSE over keys up to ``token + offset``, float32 (n_query_heads, n_tokens)."""
    n_tokens = trace.total_tokens
    keys = np.repeat(trace.keys(layer), trace.shape.group_size, axis=0).astype(float)
    logits = trace.scale * trace.queries(layer).astype(float) @ keys.swapaxes(1, 2)
    seen = np.tril(np.ones((n_tokens, n_tokens), dtype=bool), offset)
    seen[:, 0] |= offset < 0  # a query has to see something
    return np.logaddexp.reduce(np.where(seen, logits, -np.inf), axis=2).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("n_tokens", [2, 30, 150])
@pytest.mark.parametrize("wrong", ["next key", "all keys", "no self", "first key", "scale", "heads"])
def test_lse_of_other_keys_than_the_past_is_caught(tmp_path, dtype, n_tokens, wrong):
    trace = naive.small_trace(
        tmp_path / "t.kvtrace", dtype=dtype, n_tokens=n_tokens, prompt_tokens=1, n_layers=2
    )
    lse = np.stack([trace.lse(0), trace.lse(1)])
    lse[1] = {
        "next key": lambda: shifted_lse(trace, 1, 1),
        "all keys": lambda: shifted_lse(trace, 1, n_tokens),
        "no self": lambda: shifted_lse(trace, 1, -1),
        "first key": lambda: np.log(
            np.maximum(np.exp(lse[1]) - np.exp(shifted_lse(trace, 1, -n_tokens)), 1e-6)
        ),
        "scale": lambda: naive.dense_attention(
            write_trace(
                tmp_path / "s.kvtrace",
                [trace.queries(1)],
                [trace.keys(1)],
                prompt_tokens=1,
                scale=2 * trace.scale,
                dtype="float32",
            ),
            0,
        )[1],
        "heads": lambda: lse[1, ::-1],
    }[wrong]()
    arrays = [[trace.stored(layer, name) for layer in range(2)] for name in ("queries", "keys")]
    damaged = write_trace(tmp_path / "w.kvtrace", *arrays, lse=lse, prompt_tokens=1, dtype=dtype)
    with pytest.raises(TraceError, match=r"layer_001.safetensors: lse of query head \d, token"):
        check_trace(damaged)


def test_lse_wrong_where_decoding_takes_over_is_caught(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=3000, prompt_tokens=1500, n_layers=1)
    for token in (0, 1499, 1500, 2999):
        lse = trace.lse(0)
        lse[:, token] += 0.02
        damaged = write_trace(
            tmp_path / "w.kvtrace", [trace.queries(0)], [trace.keys(0)],
            lse=[lse], prompt_tokens=1500, overwrite=True,
        )  # fmt: skip
        with pytest.raises(TraceError, match=f"token {token} is"):
            check_trace(damaged, samples=0)


@pytest.mark.parametrize("name", ["queries", "keys", "values", "lse"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numbers_that_are_not_finite_are_caught(tmp_path, dtype, name):
    trace = naive.small_trace(tmp_path / "t.kvtrace", dtype=dtype)
    file = trace.path / "layer_001.safetensors"
    layout = trace.layouts[file.name][name]
    content = bytearray(file.read_bytes())
    # All ones are a NaN in every one of the types.
    content[layout.stop - 4 : layout.stop] = b"\xff" * 4
    file.write_bytes(content)
    naive.reseal(trace.path)
    last = {"queries": 3, "lse": 3}.get(name, 1)
    with pytest.raises(TraceError, match=rf"layer_001\..*: {name} of head {last} hold NaN"):
        check_trace(open_trace(trace.path))


def test_negative_token_ids_are_caught(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace")
    file = trace.path / "tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xfe\xff\xff\xff")
    naive.reseal(trace.path)
    with pytest.raises(TraceError, match="token id -2 at position 23"):
        check_trace(open_trace(trace.path))


def test_files_that_vanish_or_change_after_opening_are_caught(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace")
    file = trace.path / "layer_001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content + b"more")
    with pytest.raises(TraceError, match="bytes found; the manifest says"):
        check_trace(trace)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TraceError, match=r"layer_001\..*: sha256 .* found; the manifest says"):
        check_trace(trace)
    file.unlink()
    with pytest.raises(TraceError, match=r"layer_001\..*: cannot be read: No such file"):
        check_trace(trace)
    with pytest.raises(TraceError, match=r"layer_001\..*: cannot be read: No such file"):
        trace.keys(1)
