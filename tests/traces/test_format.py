"""What is written is what is read, bit for bit, and the ecosystem's own library reads it too."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import weakref
from unittest import mock

import naive_traces as naive
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import traces
from traces import ModelShape, TraceError, TraceWriter, check_trace, find_traces, open_trace
from traces.numbers import cast_exactly, round_to_storage, to_float32

dtypes = st.sampled_from(["float16", "bfloat16", "float32"])


def test_float16_and_bfloat16_become_float32_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits.view(np.float16)
    half = half[~np.isnan(half)]
    assert to_float32(half, "float16").tolist() == [float(number) for number in half]
    assert np.isnan(to_float32(np.array([np.nan], np.float16), "float16")).all()
    finite = half[np.isfinite(half)].reshape(2, -1).T  # in columns, subnormal numbers and -0 among them
    assert to_float32(finite, "float16").tobytes() == finite.astype(np.float32).tobytes()
    brain = to_float32(bits, "bfloat16")
    by_hand = np.frombuffer(b"".join(b"\0\0" + int(b).to_bytes(2, "little") for b in bits), "<f4")
    assert brain.tobytes() == by_hand.tobytes()


def test_rounding_returns_every_bfloat16_unchanged():
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = to_float32(bits, "bfloat16")
    rounded = round_to_storage(numbers, "bfloat16")
    finite = ~np.isnan(numbers)
    np.testing.assert_array_equal(rounded[finite], bits[finite])
    assert np.isnan(to_float32(rounded[~finite], "bfloat16")).all()


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=400)
def test_bfloat16_rounds_to_nearest_even(value):
    rounded = round_to_storage(np.array([value], dtype=np.float32), "bfloat16")
    assert int(rounded[0]) == naive.round_to_bfloat16(value)


def test_bfloat16_ties_go_to_even_and_nan_stays_nan():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], "<u4")
    rounded = round_to_storage(bits.view("<f4"), "bfloat16")
    assert [hex(number) for number in rounded[:4]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80"]
    assert np.isnan(to_float32(rounded[4:], "bfloat16")).all()


def test_exact_cast_takes_what_fits_and_refuses_the_rest():
    fits = np.array([1.5, -0.0, 2.0**-14], dtype=np.float32)
    for dtype in ("float16", "bfloat16"):
        assert to_float32(cast_exactly(fits, dtype), dtype).tobytes() == fits.tobytes()
        with pytest.raises(ValueError, match="without rounding"):
            cast_exactly(np.array([1 + 2.0**-20], dtype=np.float32), dtype)
    with pytest.raises(ValueError, match="without rounding"):
        cast_exactly(np.array([1e6], dtype=np.float32), "float16")
    with pytest.raises(ValueError, match="type float64"):
        cast_exactly(np.array([1.0]), "float16")


@pytest.mark.slow
@given(
    dtype=dtypes,
    n_layers=st.integers(1, 3),
    n_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    n_tokens=st.integers(1, 20),
    with_values=st.booleans(),
    group_bytes=st.sampled_from([1, 300, 2**20]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_in_any_chunks_comes_back_bit_for_bit(
    tmp_path_factory, dtype, n_layers, n_kv_heads, group_size, head_dim, cuts, n_tokens,
    with_values, group_bytes, seed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    shape = ModelShape(n_layers, n_kv_heads * group_size, n_kv_heads, head_dim, dtype)
    sizes = {"queries": shape.n_query_heads, "keys": n_kv_heads, "values": n_kv_heads}
    if not with_values:
        del sizes["values"]
    written = [
        {name: naive.random_stored(rng, (n, n_tokens, head_dim), dtype) for name, n in sizes.items()}
        | {"lse": naive.random_stored(rng, (shape.n_query_heads, n_tokens), "float32")}
        for _ in range(n_layers)
    ]
    token_ids = rng.integers(0, 2**31, n_tokens)
    edges = sorted({0, n_tokens, *(cut for cut in cuts if cut <= n_tokens)})
    path = tmp_path_factory.mktemp("any") / "t.kvtrace"
    with (
        mock.patch("traces.staging.GROUP_BYTES", group_bytes),
        mock.patch("traces.staging.BLOCK_BYTES", group_bytes),
        TraceWriter(path, shape, with_values=with_values) as writer,
    ):
        for start, stop in itertools.pairwise(edges):
            for layer in rng.permutation(n_layers).tolist():
                chunk = {name: array[:, start:stop] for name, array in written[layer].items()}
                writer.append(layer, **chunk)
        writer.finish(token_ids, prompt_tokens=n_tokens, model="m", origin="decoded")

    trace = open_trace(path)
    assert trace.shape == shape
    assert trace.scale == head_dim**-0.5
    np.testing.assert_array_equal(trace.token_ids, token_ids)
    start, stop = sorted(rng.integers(0, n_tokens + 1, 2).tolist())
    for layer, arrays in enumerate(written):
        for name, array in arrays.items():
            stored = trace.stored(layer, name)
            assert stored.dtype == array.dtype
            assert stored.tobytes() == array.tobytes()
            converted = getattr(trace, name)(layer, start, stop)
            assert converted.flags.c_contiguous
            assert converted.dtype == np.float32
            expected = array[:, start:stop]
            if name != "lse" and dtype == "bfloat16":
                expected = (expected.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(converted, expected.astype(np.float32))


@pytest.mark.parametrize(("dtype", "tag"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_the_official_library_reads_every_file(tmp_path, dtype, tag):
    trace = naive.small_trace(tmp_path / "t.kvtrace", dtype=dtype, n_tokens=23)
    for layer in range(2):
        path = trace.path / f"layer_{layer:03d}.safetensors"
        with safetensors.safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == ["keys", "lse", "queries", "values"]
            assert file.get_slice("queries").get_dtype() == tag
            assert file.get_slice("lse").get_dtype() == "F32"
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            assert tuple(tensor["shape"]) == trace.stored(layer, name).shape
            assert bytes(tensor["data"]) == trace.stored(layer, name).tobytes()
    tokens = load_file(trace.path / "tokens.safetensors")
    np.testing.assert_array_equal(tokens["token_ids"], trace.token_ids)
    assert tokens["token_ids"].dtype == np.int32


def test_a_layer_saved_by_the_official_library_is_read(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace")
    path = trace.path / "layer_000.safetensors"
    arrays = load_file(path)
    safetensors.numpy.save_file(arrays, path, metadata={"by": "another writer"})
    naive.reseal(trace.path)
    reopened = open_trace(trace.path)
    traces.check_trace(reopened)
    for name, array in arrays.items():
        assert reopened.stored(0, name).tobytes() == array.tobytes()


def test_stored_arrays_are_mapped_aligned_and_read_only(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=23)
    content = (trace.path / "layer_001.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    assert header_bytes % 8 == 0
    assert content[8 + header_bytes - 1 : 8 + header_bytes] in (b" ", b"}")
    for name in ("lse", "queries", "keys", "values"):
        array = trace.stored(1, name)
        assert isinstance(array.base, np.memmap)
        assert array.flags.aligned
        assert not array.flags.writeable
        start = trace.layouts["layer_001.safetensors"][name].start
        assert content[start : start + array.nbytes] == array.tobytes()


def test_a_file_is_mapped_once_while_somebody_looks_at_it(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=23)
    keys = trace.stored(0, "keys")
    assert trace.stored(0, "lse").base is keys.base
    assert open_trace(trace.path).stored(0, "queries").base is keys.base
    assert trace.stored(1, "keys").base is not keys.base
    before, path = weakref.ref(keys.base), trace.path / "layer_000.safetensors"
    # Another file under the same name is not the one that was mapped.
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert trace.stored(0, "keys").base is not keys.base
    del keys
    assert before() is None


def test_layers_stay_mapped_within_a_context_and_no_longer(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", n_tokens=23)
    with trace.mapped():
        kept = weakref.ref(trace.stored(1, "lse").base)
        assert kept() is not None
    assert kept() is None


def test_trace_id_is_of_the_content_and_of_nothing_else(tmp_path):
    first = naive.small_trace(tmp_path / "a.kvtrace")
    other_words = naive.small_trace(
        tmp_path / "b.kvtrace", model="other", seed=0, origin="decoded", task={"id": "x"},
        sampling={"do_sample": False}, rope={"theta": 1e4}, vocabulary={0: "zero"},
    )  # fmt: skip
    assert first.trace_id == other_words.trace_id
    assert first.trace_id == naive.naive_content_id(json.loads((first.path / "manifest.json").read_text()))
    changed = {
        "numbers": naive.small_trace(tmp_path / "c.kvtrace", seed=1),
        "prompt": naive.small_trace(tmp_path / "d.kvtrace", prompt_tokens=8),
        "scale": naive.small_trace(tmp_path / "e.kvtrace", scale=0.5),
        "ids": naive.small_trace(tmp_path / "f.kvtrace", token_ids=[3] * 24),
        "values": naive.small_trace(tmp_path / "g.kvtrace", with_values=False),
    }
    ids = {trace.trace_id for trace in changed.values()} | {first.trace_id}
    assert len(ids) == 1 + len(changed)


def test_manifest_keeps_every_field(tmp_path):
    fields = {
        "model": "tiny",
        "model_revision": "abc",
        "rope": {"theta": 10000.0, "scaling": None},
        "origin": "rescored",
        "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.95},
        "task": {"id": "p-1", "family": "walk", "answer": "4 2"},
        "vocabulary": {0: "a ", 1: "π\n", 23: "\ufffd"},
        "versions": {"torch": "2.6"},
    }
    trace = naive.small_trace(tmp_path / "t.kvtrace", scale=0.25, seed=5, **fields)
    manifest = trace.manifest
    assert manifest.writer.pop("torch") == fields.pop("versions")["torch"]
    assert set(manifest.writer) == {"kvbudget", "numpy", "python"}
    assert {name: getattr(manifest, name) for name in fields} == fields
    assert (manifest.scale, manifest.prompt_tokens, manifest.total_tokens) == (0.25, 7, 24)
    content = json.loads((trace.path / "manifest.json").read_text())
    assert (content["format"], content["version"]) == ("kvtrace", 1)
    assert sorted(content["files"]) == sorted(set(os.listdir(trace.path)) - {"manifest.json"})
    assert trace.text(0, 3) == "a π\n<2>"


def test_text_without_a_vocabulary_is_the_ids(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", token_ids=np.arange(24) * 3)
    assert trace.text(1, 4) == "3 6 9"
    assert trace.text(24) == ""


def test_a_trace_can_be_sent_to_another_process(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace")
    sent = pickle.loads(pickle.dumps(trace))
    assert sent == trace
    np.testing.assert_array_equal(sent.queries(1), trace.queries(1))


def test_reader_refuses_spans_layers_and_names_it_has_not(tmp_path):
    trace = naive.small_trace(tmp_path / "t.kvtrace", with_values=False)
    for start, stop in [(-1, 3), (5, 4), (0, 25)]:
        with pytest.raises(ValueError, match="allowed: a span of 0 to 24"):
            trace.queries(0, start, stop)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match="allowed: 0 to 1"):
            trace.keys(layer)
    with pytest.raises(ValueError, match="'weights'"):
        trace.stored(0, "weights")
    with pytest.raises(traces.MissingDataError, match="holds no values") as refusal:
        trace.values(0)
    assert refusal.value.exit_code == 4


def test_write_trace_rounds_once_and_its_lse_is_of_the_rounded_numbers(tmp_path):
    for dtype in ("float16", "bfloat16", "float32"):
        trace = naive.small_trace(tmp_path / f"{dtype}.kvtrace", dtype=dtype, n_tokens=40)
        rng = np.random.default_rng(0)
        queries = rng.standard_normal((2, 4, 40, 8), dtype=np.float32)
        step = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}[dtype]
        assert (np.abs(trace.queries(0) - queries[0]) <= step * np.abs(queries[0])).all()
        np.testing.assert_allclose(trace.lse(1), naive.dense_attention(trace, 1)[1], atol=2e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 2, 8), "n_layers is 0"),
        ((1, 4, 3, 8), "n_query_heads is 4; allowed: a multiple of n_kv_heads"),
        ((1, 4, 2, -8), "head_dim is -8"),
        ((1, 4, 2, 8.0), "head_dim is 8.0"),
        ((True, 4, 2, 8), "n_layers is True"),
        ((1, 4, 2, 8, "int8"), "dtype is 'int8'; allowed: float16, bfloat16, float32"),
    ],
)
def test_model_shape_refuses_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(*sizes)


def test_model_shape_counts_bytes_and_groups():
    shape = ModelShape(32, 32, 8, 128, "bfloat16")
    assert shape.group_size == 4
    assert shape.bytes_per_entry == 512
    assert ModelShape(1, 2, 1, 8, "float32").bytes_per_entry == 64


@pytest.mark.slow
def test_importing_the_package_loads_no_numpy():
    code = (
        "import sys, traces, traces.commands; assert 'numpy' not in sys.modules;"
        "traces.open_trace; assert 'numpy' in sys.modules;"
        "assert all(getattr(traces, name) for name in traces.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = traces.nothing


def test_the_bundled_sample_goes_by_its_name_and_is_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = open_trace("sample")
    assert [sample.path] == find_traces(["sample"])
    assert sample.manifest.task["correct"] is True
    assert sample.text(0, 8).split()[:2] == ["<bos>", "walk"]
    assert check_trace(sample)
    (tmp_path / "sample").mkdir()
    with pytest.raises(TraceError):
        open_trace("sample")
