"""Arrays of other libraries make the same trace as NumPy's, or are refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from traces import TraceWriter, check_trace, write_trace
from traces.foreign import as_numpy
from traces.shape import ModelShape

QUERIES = np.random.default_rng(1).standard_normal((2, 4, 9, 8)).astype(np.float16).astype(np.float32)
KEYS = np.random.default_rng(2).standard_normal((2, 2, 9, 8)).astype(np.float16).astype(np.float32)


class OnlyDLPack:
    """A tensor of which nothing else is known."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.shape = tensor.shape

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


class OnlyArray:
    def __init__(self, array):
        self._array = array
        self.shape = array.shape

    def __array__(self, dtype=None, copy=None):
        return self._array


WAYS = {
    "tensor": torch.from_numpy,
    "tensors": lambda array: [torch.from_numpy(layer) for layer in array],
    "half": lambda array: torch.from_numpy(array).half(),
    "gradient": lambda array: torch.from_numpy(array).requires_grad_(),
    "strided": lambda array: torch.from_numpy(array.copy()).transpose(2, 3).contiguous().transpose(2, 3),
    "DLPack": lambda array: [OnlyDLPack(torch.from_numpy(layer)) for layer in array],
    "__array__": lambda array: [OnlyArray(layer) for layer in array],
    "lists": lambda array: list(array),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_library_makes_the_same_trace(tmp_path, way):
    settings = {"prompt_tokens": 4, "model": "m"}
    expected = write_trace(tmp_path / "numpy.kvtrace", QUERIES, KEYS, values=KEYS, **settings)
    arrays = [WAYS[way](array) for array in (QUERIES, KEYS)]
    found = write_trace(tmp_path / "other.kvtrace", *arrays, values=arrays[1], **settings)
    assert found.trace_id == expected.trace_id


def test_bfloat16_is_kept_to_the_bit(tmp_path):
    queries, keys = (torch.from_numpy(array).bfloat16() for array in (QUERIES, KEYS))
    trace = write_trace(tmp_path / "t.kvtrace", queries, keys, prompt_tokens=4, dtype="bfloat16")
    check_trace(trace)
    for layer in range(2):
        assert trace.stored(layer, "keys").tobytes() == keys[layer].view(torch.int16).numpy().tobytes()


def test_a_writer_takes_tensors_and_ids_of_any_library(tmp_path):
    with TraceWriter(tmp_path / "t.kvtrace", ModelShape(2, 4, 2, 8, "bfloat16")) as writer:
        for layer in range(2):
            queries, keys = (torch.from_numpy(array[layer]).bfloat16() for array in (QUERIES, KEYS))
            writer.append(layer, queries, keys, torch.zeros(4, 9))
        trace = writer.finish(torch.arange(9), prompt_tokens=4, model="m", origin="decoded")
    assert trace.token_ids.tolist() == [*range(9)]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ma.masked_array(KEYS, KEYS > 1), "layer 0: keys is a masked array"),
        (KEYS + 1j, "layer 0: keys holds complex"),
        (KEYS.astype(object), "layer 0: keys holds object"),
        (KEYS.astype(str), "layer 0: keys holds <U"),
        (KEYS.astype(np.int64), "layer 0: keys: numbers of type int64 found"),
        (torch.from_numpy(KEYS).to(torch.complex64), "layer 0: keys holds complex64"),
        (torch.from_numpy(KEYS).to_sparse(), "layer 0: keys is a Tensor that gives no array"),
        ([object(), object()], "layer 0: keys holds object"),
        ([None, None], "layer 0: keys holds object"),
        (KEYS[:, :, :, 0], "keys: shape (2, 9) found; allowed: per layer"),
        ([], "keys: no layer found"),
    ],
)
def test_what_is_no_array_of_numbers_is_one_line(tmp_path, array, words):
    with pytest.raises(ValueError, match="keys") as refused:
        write_trace(tmp_path / "t.kvtrace", QUERIES, array, prompt_tokens=4)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_numbers_of_ml_dtypes_are_their_bits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = KEYS.astype(ml_dtypes.bfloat16)
    assert as_numpy(array, "keys").tobytes() == array.tobytes()
