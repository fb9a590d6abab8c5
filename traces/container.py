"""The safetensors container: a length, a JSON header, and the bytes of each array.

The official library reads these files. They are parsed here as well, because a trace has to be
mapped into memory without a copy, in types that NumPy lacks, and refused in words when damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeGuard
from weakref import WeakValueDictionary

import numpy as np
from msgspec import Meta

from traces.documents import parse_json
from traces.errors import TraceError

TAGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int32": "I32"}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}

_LENGTH_BYTES = 8
# Files that are mapped now, as they were when they were mapped.
_maps: WeakValueDictionary[tuple[str, int, int, int, int], np.memmap[Any, Any]] = WeakValueDictionary()
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 2**20  # for at most four arrays


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Where one array lies in its file.

    Attributes
    ----------
    tag : str
        The type as safetensors writes it, e.g. ``BF16``.
    shape : tuple of int
    start, stop : int
        First byte and end, counted from the beginning of the file.
    """

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorSource:
    """An array to be written: its type, shape, and its elements in chunks, in C order."""

    tag: str
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]


class FileRecord(TypedDict):
    """Size in bytes and sha256 of a file."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def write_tensors(path: Path, sources: Mapping[str, TensorSource]) -> FileRecord:
    """Write arrays to one file, hashing while writing, and wait until the disk has them.

    Parameters
    ----------
    path : Path
        The file to create.
    sources : mapping of str to TensorSource
        Arrays in the order of the file.

    Returns
    -------
    FileRecord
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        def write_array(source: TensorSource) -> None:
            # A function, so that the last chunk is released before the next array is read.
            for chunk in source.chunks:
                stored = np.ascontiguousarray(chunk, dtype=NUMPY_DTYPES[source.tag])
                write(stored.reshape(-1).view(np.uint8).data)

        write(_pack_header(sources))
        for source in sources.values():
            write_array(source)
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def read_layout(path: Path) -> dict[str, TensorLayout]:
    """Read where the arrays of a file lie, and check that they fill it without gap or overlap.

    Raises
    ------
    TraceError
        If the header is unreadable or disagrees with the size of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise TraceError(
                f"{path}: header length {length} found in a file of {size} bytes; "
                f"allowed: 2 to {max(0, size - _LENGTH_BYTES)}"
            )
        content = file.read(length)
    header = parse_json(content, f"{path}: header", dict[str, Any], TraceError)
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + length
    layout = {name: _parse_entry(path, name, header[name], data_start) for name in header}
    _check_coverage(path, layout, data_start, size)
    return layout


def map_tensor(path: Path, layout: TensorLayout) -> np.ndarray:
    """Map one array into memory, read-only and without a copy; bfloat16 comes as uint16 bits.

    The file stays open only as long as an array of it lives, so that many traces can be open at once. As long
    as one does, others come from the same map, in which the pages that were looked at need not be found anew.
    """
    dtype = NUMPY_DTYPES[layout.tag]
    return np.ndarray(layout.shape, dtype, _map_file(path), layout.start)


def _map_file(path: Path) -> np.memmap[Any, Any]:
    status = path.stat()
    name = str(path), status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    mapped = _maps.get(name)
    if mapped is None:
        mapped = np.memmap(path, np.uint8, mode="r")
        _maps[name] = mapped
    return mapped


def _pack_header(sources: Mapping[str, TensorSource]) -> bytes:
    entries: dict[str, dict[str, object]] = {}
    start = 0
    for name, source in sources.items():
        stop = start + math.prod(source.shape) * NUMPY_DTYPES[source.tag].itemsize
        entries[name] = {
            "dtype": source.tag,
            "shape": list(source.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    content = json.dumps(entries, separators=(",", ":")).encode("ascii")
    # The length field is itself 8 bytes, so a padded header leaves the data aligned.
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorLayout:
    damaged = TraceError(f"{path}: the header entry of {name[:40]!r} is damaged")
    if not isinstance(entry, dict):
        raise damaged
    tag, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(tag, str) or not _are_counts(shape) or not _are_counts(offsets):
        raise damaged
    if tag not in NUMPY_DTYPES:
        raise TraceError(f"{path}: {name[:40]!r} has dtype {tag[:20]!r}; allowed: {', '.join(NUMPY_DTYPES)}")
    if len(offsets) != 2 or len(shape) > 4:
        raise damaged
    start, stop = offsets
    if stop - start != math.prod(shape) * NUMPY_DTYPES[tag].itemsize:
        raise damaged
    return TensorLayout(tag, tuple(shape), data_start + start, data_start + stop)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(path: Path, layout: Mapping[str, TensorLayout], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in sorted(layout.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != expected:
            raise TraceError(f"{path}: the arrays leave a gap or overlap at byte {expected}")
        expected = tensor.stop
    if expected != size:
        raise TraceError(f"{path}: the arrays end at byte {expected}, the file has {size} bytes")
