"""What a trace says of itself: the fields of manifest.json, read and refused in words."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from traces.errors import TraceError
from traces.shape import ModelShape

FORMAT = "kvtrace"
VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENS_NAME = "tokens.safetensors"
ORIGINS = ("decoded", "rescored", "synthetic")

_SHAPE_FIELDS = ("n_layers", "n_query_heads", "n_kv_heads", "head_dim", "dtype")
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "trace_id": (str,),
    "model": (str,),
    "model_revision": (str,),
    "n_layers": (int,),
    "n_query_heads": (int,),
    "n_kv_heads": (int,),
    "head_dim": (int,),
    "scale": (float, int),
    "rope": (dict,),
    "dtype": (str,),
    "prompt_tokens": (int,),
    "total_tokens": (int,),
    "has_values": (bool,),
    "origin": (str,),
    "sampling": (dict,),
    "seed": (int, type(None)),
    "task": (dict,),
    "vocabulary": (dict,),
    "writer": (dict,),
    "files": (dict,),
}


@dataclass(frozen=True)
class Manifest:
    """The fields of a trace's manifest.json.

    Attributes
    ----------
    trace_id : str
        sha256 over the content: shape, scale, token counts and the checksums of all files.
    scale : float
        Attention scale: ``logits = scale * q . k``.
    origin : str
        ``decoded``, ``rescored`` or ``synthetic``.
    task : dict
        Identity of the problem and its answer, or what is known of a synthetic trace.
    vocabulary : dict of int to str
        Text of the token ids that occur; may be empty.
    writer : dict
        Versions of the software that wrote the trace.
    files : dict of str to dict
        ``size`` in bytes and ``sha256`` of every file but the manifest.
    """

    trace_id: str
    model: str
    model_revision: str
    n_layers: int
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: dict[str, Any]
    dtype: str
    prompt_tokens: int
    total_tokens: int
    has_values: bool
    origin: str
    sampling: dict[str, Any]
    seed: int | None
    task: dict[str, Any]
    vocabulary: dict[int, str]
    writer: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def shape(self) -> ModelShape:
        """Return the sizes of the model's attention."""
        return ModelShape(**{name: getattr(self, name) for name in _SHAPE_FIELDS})

    def to_json(self) -> str:
        """Write the fields as JSON text.

        Raises
        ------
        ValueError
            If a field holds what JSON cannot express.
        """
        content = {"format": FORMAT, "version": VERSION}
        content |= {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            return json.dumps(content, indent=1, allow_nan=False) + "\n"
        except (TypeError, RecursionError) as error:
            raise ValueError(f"a manifest field cannot be written as JSON: {error}") from None


def layer_name(layer: int) -> str:
    """Return the file name of a layer."""
    return f"layer_{layer:03d}.safetensors"


def file_names(n_layers: int) -> Iterator[str]:
    """Yield the names of all files of a trace but the manifest."""
    yield TOKENS_NAME
    for layer in range(n_layers):
        yield layer_name(layer)


def content_id(
    shape: ModelShape,
    scale: float,
    prompt_tokens: int,
    total_tokens: int,
    files: dict[str, dict[str, Any]],
) -> str:
    """Return the sha256 that identifies a trace by its content, whoever wrote it and when."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "shape": {name: getattr(shape, name) for name in _SHAPE_FIELDS},
        "scale": scale,
        "prompt_tokens": prompt_tokens,
        "total_tokens": total_tokens,
        "files": {name: record["sha256"] for name, record in files.items()},
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.json.

    Raises
    ------
    TraceError
        If it cannot be read, is of another format or version, or a field is missing or wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(path, content)


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """Check the content of a manifest.json; ``path`` is what messages call it.

    Raises
    ------
    TraceError
        If it is of another format or version, or a field is missing or wrong.
    """
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise TraceError(f"{path}: not valid JSON; the file is corrupt") from None
    if not isinstance(content, dict):
        raise TraceError(f"{path}: {_show(content)} found; allowed: a JSON object")
    _check_version(path, content)
    found: dict[str, Any] = {}
    for name, kinds in _FIELD_TYPES.items():
        if name not in content:
            raise TraceError(f"{path}: field {name!r} is missing")
        # An exact type: in Python a bool is an int as well.
        if type(content[name]) not in kinds:
            allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TraceError(f"{path}: {name} is {_show(content[name])}; allowed: {allowed}")
        found[name] = content[name]
    found["scale"] = _parse_scale(path, found["scale"])
    found["vocabulary"] = _parse_vocabulary(path, found["vocabulary"])
    manifest = Manifest(**found)
    _check_fields(path, manifest)
    _check_files(path, manifest)
    return manifest


def _check_version(path: Path | str, content: dict[str, Any]) -> None:
    name, version = content.get("format"), content.get("version")
    if name != FORMAT:
        raise TraceError(f"{path}: format {_show(name)} found; allowed: {FORMAT!r}")
    if type(version) is not int or version != VERSION:
        raise TraceError(f"{path}: version {_show(version)} found, this build reads {VERSION}")


def _parse_scale(path: Path | str, scale: float) -> float:
    try:
        scale = float(scale)
    except OverflowError:
        scale = math.inf
    if not (math.isfinite(scale) and scale > 0):
        raise TraceError(f"{path}: scale is {scale}; allowed: a positive finite number")
    return scale


def _parse_vocabulary(path: Path | str, vocabulary: dict[str, Any]) -> dict[int, str]:
    pieces: dict[int, str] = {}
    for key, piece in vocabulary.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or not isinstance(piece, str):
            raise TraceError(f"{path}: vocabulary has {_show(key)}: {_show(piece)}; allowed: token id: text")
        pieces[int(key)] = piece
    return pieces


def _check_fields(path: Path | str, manifest: Manifest) -> None:
    try:
        _ = manifest.shape
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from None
    if manifest.origin not in ORIGINS:
        raise TraceError(f"{path}: origin is {_show(manifest.origin)}; allowed: {', '.join(ORIGINS)}")
    if not 1 <= manifest.total_tokens < 2**31:
        raise TraceError(f"{path}: total_tokens is {_show(manifest.total_tokens)}; allowed: 1 up")
    if not 1 <= manifest.prompt_tokens <= manifest.total_tokens:
        raise TraceError(
            f"{path}: prompt_tokens is {_show(manifest.prompt_tokens)}; "
            f"allowed: 1 to total_tokens ({manifest.total_tokens})"
        )


def _check_files(path: Path | str, manifest: Manifest) -> None:
    n_expected = manifest.n_layers + 1
    if len(manifest.files) != n_expected:
        raise TraceError(
            f"{path}: files lists {len(manifest.files)} files; allowed: {n_expected}, "
            f"for n_layers {_show(manifest.n_layers)}"
        )
    for name in file_names(manifest.n_layers):
        if name not in manifest.files:
            raise TraceError(f"{path}: files lacks {name!r}")
        record = manifest.files[name]
        if not isinstance(record, dict) or type(record.get("size")) is not int:
            raise TraceError(f"{path}: files[{name!r}] is {_show(record)}; allowed: size, sha256")
        if not re.fullmatch(r"[0-9a-f]{64}", str(record.get("sha256"))):
            raise TraceError(f"{path}: files[{name!r}] has no sha256 of 64 digits")
    expected = content_id(
        manifest.shape,
        manifest.scale,
        manifest.prompt_tokens,
        manifest.total_tokens,
        manifest.files,
    )
    if manifest.trace_id != expected:
        raise TraceError(f"{path}: trace_id is {_show(manifest.trace_id)}; the content gives {expected!r}")


def _show(value: object) -> str:
    """Show a value in one short line, whatever it holds."""
    # An integer of thousands of digits cannot even be printed.
    text = "a huge integer" if isinstance(value, int) and abs(value) > 10**30 else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
