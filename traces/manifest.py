"""What a trace says of itself: the fields of manifest.json, read and refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from traces.container import FileRecord
from traces.documents import convert, digest, parse_json, read_document, shown
from traces.errors import TraceError
from traces.shape import ModelShape
from traces.version import MINOR, VERSION

FORMAT = "kvtrace"
MANIFEST_NAME = "manifest.json"
TOKENS_NAME = "tokens.safetensors"
DRAWS_NAME = "draws.safetensors"
ORIGINS = ("decoded", "rescored", "synthetic")

_SHAPE_FIELDS = ("n_layers", "n_query_heads", "n_kv_heads", "head_dim", "dtype")
_DIGEST = "manifest_sha256"
# Since version 1.1 a manifest carries a digest of itself.
_SIGNED_SINCE = 1
_ROPE_SIZES = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow"),
)
# What is read of a task, and put into tables.
_TASK_TEXTS = ("id", "family", "answer", "decoded_answer")

# Control characters would move a terminal's cursor wherever the name is shown.
Name = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1000)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
TokenCount = Annotated[int, Meta(ge=1, lt=2**31)]


class Sensitivity(TypedDict):
    """How many draws a step sensitivities are of, and their files."""

    n_draws: Annotated[int, Meta(ge=1, le=2**16)]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Manifest:
    """The fields of a trace's manifest.json.

    Attributes
    ----------
    trace_id : str
        sha256 over the content: shape, scale, token counts and the checksums of all files.
    model, model_revision : str
    n_layers, n_query_heads, n_kv_heads, head_dim : int
    scale : float
        Attention scale: ``logits = scale * q . k``.
    rope : dict
        Parameters of the rotary embedding, as the model's configuration has them.
    dtype : str
        Of the stored numbers.
    prompt_tokens, total_tokens : int
    has_values : bool
    origin : str
        ``decoded``, ``rescored`` or ``synthetic``.
    sampling : dict
    seed : int or None
    task : dict
        Identity of the problem and its answer, or what is known of a synthetic trace.
    vocabulary : dict of int to str
        Text of the token ids that occur; may be empty.
    writer : dict
        Versions of the software that wrote the trace.
    files : dict of str to FileRecord
        Of every file but the manifest and those of sensitivities.
    sensitivity : Sensitivity or None
        Since version 1.2. The ``trace_id`` is the same with and without.
    minor : int
        Of the version; an older reader passes over what it added.
    manifest_sha256 : str or None
        Digest of all the rest; None before version 1.1, whose manifests nothing
        vouches for beyond what ``trace_id`` covers.
    """

    trace_id: Sha256
    model: Name
    model_revision: Name
    n_layers: int
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    scale: Annotated[float, Meta(gt=0)]
    rope: dict[str, Any]
    dtype: str
    prompt_tokens: TokenCount
    total_tokens: TokenCount
    has_values: bool
    origin: Literal["decoded", "rescored", "synthetic"]
    sampling: dict[str, Any]
    seed: int | None
    task: dict[str, Any]
    vocabulary: dict[Annotated[int, Meta(ge=0)], str]
    writer: dict[str, Any]
    files: dict[str, FileRecord]
    sensitivity: Sensitivity | None = None
    minor: Annotated[int, Meta(ge=0)] = MINOR
    manifest_sha256: Sha256 | None = None

    @property
    def shape(self) -> ModelShape:
        """Return the sizes of the model's attention."""
        return ModelShape(**{name: getattr(self, name) for name in _SHAPE_FIELDS})

    @property
    def all_files(self) -> dict[str, FileRecord]:
        """Return the records of every file but the manifest."""
        return self.files | ({} if self.sensitivity is None else self.sensitivity["files"])

    @property
    def n_draws(self) -> int:
        """Return how many draws a step sensitivities are of; 0 without them."""
        return 0 if self.sensitivity is None else self.sensitivity["n_draws"]

    def to_json(self) -> str:
        """Write the fields as JSON text.

        Raises
        ------
        ValueError
            If a field holds what JSON cannot express.
        """
        content = {"format": FORMAT, "version": VERSION}
        content |= {field.name: getattr(self, field.name) for field in fields(self)}
        del content[_DIGEST]
        try:
            content = json.loads(json.dumps(content, allow_nan=False))
            content[_DIGEST] = digest(content, without=_DIGEST)
            return json.dumps(content, indent=1) + "\n"
        except (TypeError, RecursionError) as error:
            raise ValueError(f"a manifest field cannot be written as JSON: {error}") from None


def layer_name(layer: int) -> str:
    """Return the file name of a layer."""
    return f"layer_{layer:03d}.safetensors"


def sensitivity_dtype(dtype: str) -> str:
    """Return the type of sensitivities beside numbers of ``dtype``; gradients may leave a float16's range."""
    return "float32" if dtype == "float32" else "bfloat16"


def sensitivity_name(layer: int) -> str:
    """Return the file name of a layer's sensitivities."""
    return f"sensitivity_{layer:03d}.safetensors"


def file_names(n_layers: int) -> Iterator[str]:
    """Yield the names of all files of a trace but the manifest and those of sensitivities."""
    yield TOKENS_NAME
    for layer in range(n_layers):
        yield layer_name(layer)


def content_id(
    shape: ModelShape,
    scale: float,
    prompt_tokens: int,
    total_tokens: int,
    files: Mapping[str, FileRecord],
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
    return digest(content)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.json.

    Raises
    ------
    TraceError
        If it cannot be read, is of another format or version, or a field is missing or wrong.
    """
    return parse_manifest(path, read_document(path, str(path), TraceError))


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """Check the content of a manifest.json; ``path`` is what messages call it.

    Raises
    ------
    TraceError
        If it is of another format or version, or a field is missing or wrong.
    """
    manifest = parse_fields(path, text)
    _check_files(path, manifest)
    return manifest


def parse_fields(path: Path | str, text: str | bytes) -> Manifest:
    """Check the content of a manifest but for its files, which need not be there yet; as `parse_manifest`."""
    where = str(path)
    content = parse_json(text, where, dict[str, Any], TraceError)
    _check_version(path, content)
    found = {"minor": 0} | content
    for name in ("format", "version"):
        del found[name]
    manifest: Manifest = convert(found, where, Manifest, TraceError)
    _check_signature(path, manifest, content)
    _check_fields(path, manifest)
    return manifest


def _check_version(path: Path | str, content: dict[str, Any]) -> None:
    name, version = content.get("format"), content.get("version")
    if name != FORMAT:
        raise TraceError(f"{path}: format {shown(name)} found; allowed: {FORMAT!r}")
    if type(version) is not int or version != VERSION:
        raise TraceError(f"{path}: version {shown(version)} found, this build reads {VERSION}")


def _check_signature(path: Path | str, manifest: Manifest, content: dict[str, Any]) -> None:
    is_signed = manifest.manifest_sha256 is not None
    if is_signed != (manifest.minor >= _SIGNED_SINCE):
        found = "there" if is_signed else "missing"
        raise TraceError(
            f"{path}: {_DIGEST} is {found} at version {VERSION}.{manifest.minor}; "
            f"allowed: there from version {VERSION}.{_SIGNED_SINCE}"
        )
    expected = digest(content, without=_DIGEST)
    if is_signed and manifest.manifest_sha256 != expected:
        raise TraceError(
            f"{path}: {_DIGEST} is {manifest.manifest_sha256}, the fields give {expected}; "
            "the manifest was changed"
        )


def _check_fields(path: Path | str, manifest: Manifest) -> None:
    try:
        _ = manifest.shape
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from None
    if manifest.prompt_tokens > manifest.total_tokens:
        raise TraceError(
            f"{path}: prompt_tokens is {manifest.prompt_tokens}; "
            f"allowed: 1 to total_tokens ({manifest.total_tokens})"
        )
    for name in _TASK_TEXTS:
        told = manifest.task.get(name)
        if not isinstance(told, str | None):
            raise TraceError(f"{path}: task.{name} is {shown(told)}; allowed: text")
        if name in ("id", "family") and told and not told.isprintable():
            raise TraceError(f"{path}: task.{name} is {shown(told)}; allowed: no control characters")
    _check_rope(path, manifest.rope)


def _check_rope(path: Path | str, rope: dict[str, Any]) -> None:
    """Refuse what no model's RoPE can be; which kinds can be computed with is the reader's business."""
    for name, value in rope.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "rope_type":
            fits, allowed = isinstance(value, str), "text"
        elif name == "partial_rotary_factor":
            fits, allowed = is_number and 0 < value <= 1, "above 0, at most 1"
        elif name in _ROPE_SIZES:
            fits, allowed = is_number and value > 0, "a number above 0"
        else:
            continue
        # A configuration may name a parameter that it does not set.
        if value is not None and not fits:
            raise TraceError(f"{path}: rope.{name} is {shown(value)}; allowed: {allowed}")


def _check_files(path: Path | str, manifest: Manifest) -> None:
    n_expected = manifest.n_layers + 1
    if len(manifest.files) != n_expected:
        raise TraceError(
            f"{path}: files lists {len(manifest.files)} files; allowed: {n_expected}, "
            f"for n_layers {shown(manifest.n_layers)}"
        )
    for name in file_names(manifest.n_layers):
        if name not in manifest.files:
            raise TraceError(f"{path}: files lacks {name!r}")
    if manifest.sensitivity is not None:
        named = set(manifest.sensitivity["files"])
        needed = {DRAWS_NAME, *map(sensitivity_name, range(manifest.n_layers))}
        if named != needed:
            wrong = min(named ^ needed)
            how = "lacks" if wrong in needed else "lists"
            raise TraceError(
                f"{path}: sensitivity.files {how} {shown(wrong)}; allowed: {DRAWS_NAME} and one a layer"
            )
    expected = content_id(
        manifest.shape,
        manifest.scale,
        manifest.prompt_tokens,
        manifest.total_tokens,
        manifest.files,
    )
    if manifest.trace_id != expected:
        raise TraceError(f"{path}: trace_id is {manifest.trace_id}; the content gives {expected}")
