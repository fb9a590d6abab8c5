"""Recording a trace: tokens stream in, and a directory appears only when it is complete."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from traces.container import TAGS, TensorSource, write_tensors
from traces.errors import TraceError
from traces.foreign import as_numpy
from traces.manifest import (
    DRAWS_NAME,
    ORIGINS,
    TOKENS_NAME,
    FileRecord,
    Manifest,
    Sensitivity,
    content_id,
    layer_name,
    parse_fields,
    sensitivity_dtype,
    sensitivity_name,
)
from traces.numbers import STORAGE_DTYPES, all_finite, cast_exactly, round_to_storage
from traces.shape import ModelShape
from traces.staging import Part
from traces.store import open_trace
from traces.target import Target
from traces.tokens import as_token_ids, as_vocabulary
from traces.trace import Trace
from traces.version import package_version


class TraceWriter:
    """Write a trace in chunks of tokens, holding one chunk or a group of heads in memory.

    Everything is written to a hidden directory beside ``path`` and renamed when complete. A
    recording that fails or is killed leaves no trace at ``path``, and one it was to replace stays.
    As a context manager it gives up the recording unless `finish` was called. Two writers must not
    write to one path at the same time.

    Parameters
    ----------
    path : str or Path
        The directory to create, ``NAME.kvtrace``.
    shape : ModelShape
    scale : float, optional
        Attention scale; ``head_dim ** -0.5`` by default.
    with_values : bool
        Whether values are recorded.
    overwrite : bool
        Whether a finished trace at ``path`` may be replaced.

    Raises
    ------
    UserError
        If ``path`` is not named ``*.kvtrace``, or holds a finished trace or anything else.
    ValueError
        If the scale is not a positive finite number.
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        *,
        scale: float | None = None,
        with_values: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5 if scale is None else float(scale)
        self.with_values = with_values
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}; allowed: a positive finite number")
        self._target = Target(Path(path), overwrite)
        self._n_tokens = [0] * shape.n_layers
        # Draws and decode steps of the sensitivities of each layer that has been given them.
        self._sensitivities: dict[int, tuple[tuple[int, ...], FileRecord]] = {}
        self._drawn: tuple[tuple[int, ...], FileRecord] | None = None
        self._open = True

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    @property
    def path(self) -> Path:
        """Return the path the trace will have."""
        return self._target.path

    def append(
        self,
        layer: int,
        queries: np.ndarray,
        keys: np.ndarray,
        lse: np.ndarray,
        values: np.ndarray | None = None,
    ) -> None:
        """Append the next tokens of a layer.

        Parameters
        ----------
        layer : int
        queries : np.ndarray
            (n_query_heads, n, head_dim), after RoPE, in the trace's dtype (bfloat16 as uint16 bit
            patterns), or float32 if nothing has to be rounded.
        keys : np.ndarray
            (n_kv_heads, n, head_dim), likewise.
        lse : np.ndarray
            float32 (n_query_heads, n).
        values : np.ndarray, optional
            As ``keys``.

        Raises
        ------
        ValueError
            If a shape or type does not fit, or a number is not finite.
        OSError
            If the disk is full; the recording is then given up.
        """
        self._check_open()
        if not 0 <= layer < self.shape.n_layers:
            raise ValueError(f"layer is {layer}; allowed: 0 to {self.shape.n_layers - 1}")
        if (values is not None) != self.with_values:
            found = "given" if values is not None else "missing"
            raise ValueError(f"values are {found}; allowed with with_values={self.with_values}")
        given = {"queries": queries, "keys": keys, "lse": lse} | (
            {} if values is None else {"values": values}
        )
        arrays = {name: as_numpy(array, f"layer {layer}: {name}") for name, array in given.items()}
        n = arrays["queries"].shape[1] if arrays["queries"].ndim > 1 else 0
        stored = {name: self._check_array(layer, name, array, n) for name, array in arrays.items()}
        try:
            for name, array in stored.items():
                self._part(layer, name).append(array)
        except BaseException:
            # Some of the tokens may be on disk already; nothing could be appended after them.
            self.abort()
            raise
        self._n_tokens[layer] += n

    def write_draws(self, log_weights: np.ndarray) -> None:
        """Store how likely the tokens were that sensitivities are of; see ``Trace.draw_log_weights``.

        Parameters
        ----------
        log_weights : np.ndarray
            Finite floats, (n_draws, n_steps).

        Raises
        ------
        ValueError
            If the shape or type does not fit, or a number is not finite.
        OSError
            If the disk is full; the recording is then given up.
        """
        self._check_open()
        array = as_numpy(log_weights, "log_weights")
        if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(
                f"log_weights are {array.dtype} {array.shape}; allowed: finite floats (n_draws, n_steps)"
            )
        source = TensorSource(TAGS["float32"], array.shape, [array])
        self._drawn = array.shape, self._write(DRAWS_NAME, {"log_weights": source})

    def _write(self, name: str, sources: Mapping[str, TensorSource]) -> FileRecord:
        try:
            return write_tensors(self._target.staging / name, sources)
        except BaseException:
            self.abort()
            raise

    def write_sensitivity(self, layer: int, sensitivity: np.ndarray) -> None:
        """Store a layer's sensitivities, of every decode step; see ``Trace.sensitivity``.

        Parameters
        ----------
        layer : int
        sensitivity : np.ndarray
            (n_draws, n_query_heads, n_steps, head_dim), floats, or bfloat16 as uint16 bit patterns. They are
            rounded to bfloat16 unless the trace is float32.

        Raises
        ------
        ValueError
            If the shape or type does not fit, a number is not finite, or the layer has been given them.
        OSError
            If the disk is full; the recording is then given up.
        """
        self._check_open()
        if not 0 <= layer < self.shape.n_layers or layer in self._sensitivities:
            raise ValueError(f"layer is {layer}; allowed: 0 to {self.shape.n_layers - 1}, once each")
        array, shape = as_numpy(sensitivity, f"layer {layer}: sensitivity"), self.shape
        n_draws, _, n_steps, _ = array.shape if array.ndim == 4 else (0, 0, 0, 0)
        if n_draws < 1 or array.shape != (n_draws, shape.n_query_heads, n_steps, shape.head_dim):
            allowed = f"(n_draws, {shape.n_query_heads}, n_steps, {shape.head_dim})"
            raise ValueError(f"layer {layer}: sensitivity has shape {array.shape}; allowed: {allowed}")
        dtype = sensitivity_dtype(shape.dtype)
        try:
            stored = round_to_storage(array, dtype)
        except ValueError as error:
            raise ValueError(f"layer {layer}: sensitivity: {error}") from None
        if not all_finite(stored, dtype):
            raise ValueError(f"layer {layer}: sensitivity holds NaN or infinity; allowed: finite")
        source = TensorSource(TAGS[dtype], stored.shape, [stored])
        record = self._write(sensitivity_name(layer), {"sensitivity": source})
        self._sensitivities[layer] = (n_draws, n_steps), record

    def finish(
        self,
        token_ids: Sequence[int] | np.ndarray,
        *,
        prompt_tokens: int,
        model: str,
        origin: str,
        model_revision: str = "",
        rope: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
        task: Mapping[str, Any] | None = None,
        vocabulary: Mapping[int, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Trace:
        """Complete the trace, move it to its place and open it.

        Parameters
        ----------
        token_ids : sequence of int
            All tokens, prompt first; one for each token appended to every layer.
        prompt_tokens : int
            From 1 to the number of tokens.
        model : str
        origin : str
            ``decoded``, ``rescored`` or ``synthetic``.
        model_revision : str
        rope, sampling : mapping, optional
            What JSON can express.
        seed : int, optional
        task : mapping, optional
            What JSON can express.
        vocabulary : mapping of int to str, optional
            Text of the token ids that occur.
        versions : mapping of str to str, optional
            Versions of further software that took part.

        Raises
        ------
        ValueError
            If counts disagree or a field cannot be stored.
        OSError
            If the disk is full; the recording is then given up.
        """
        self._check_open()
        ids = as_token_ids(token_ids)
        self._check_counts(len(ids), prompt_tokens)
        if origin not in ORIGINS:
            raise ValueError(f"origin is {origin!r}; allowed: {', '.join(ORIGINS)}")
        provenance: dict[str, Any] = {
            "prompt_tokens": int(prompt_tokens),
            "total_tokens": len(ids),
            "model": str(model),
            "model_revision": str(model_revision),
            "rope": dict(rope or {}),
            "origin": origin,
            "sampling": dict(sampling or {}),
            "seed": None if seed is None else int(seed),
            "task": dict(task or {}),
            "vocabulary": as_vocabulary(vocabulary or {}),
            "writer": _own_versions() | dict(versions or {}),
            "sensitivity": self._sensitivity(len(ids) - prompt_tokens),
        }
        # What could not be written, or not be read back, is refused before the long work, not after it.
        try:
            parse_fields(self.path, self._manifest(provenance, {}).to_json())
        except TraceError as error:
            raise ValueError(str(error)) from None
        try:
            files = self._write_files(ids)
            self._target.publish(self._manifest(provenance, files).to_json())
        except BaseException:
            self.abort()
            raise
        self._open = False
        return open_trace(self.path)

    def abort(self) -> None:
        """Give up the recording and delete what was written; without effect once finished."""
        if self._open:
            self._open = False
            self._target.discard()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"{self.path}: the recording was finished or given up")

    def _row_shape(self, name: str) -> tuple[int, ...]:
        shape = self.shape
        if name == "lse":
            return (shape.n_query_heads,)
        n_heads = shape.n_query_heads if name == "queries" else shape.n_kv_heads
        return (n_heads, shape.head_dim)

    def _check_array(self, layer: int, name: str, array: np.ndarray, n: int) -> np.ndarray:
        n_heads, *rest = self._row_shape(name)
        if array.shape != (n_heads, n, *rest):
            raise ValueError(f"layer {layer}: {name} has shape {array.shape}; allowed: {(n_heads, n, *rest)}")
        dtype = "float32" if name == "lse" else self.shape.dtype
        try:
            stored = cast_exactly(array, dtype)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {name}: {error}") from None
        if not all_finite(stored, dtype):
            raise ValueError(f"layer {layer}: {name} holds NaN or infinity; allowed: finite")
        return stored

    def _check_counts(self, n_ids: int, prompt_tokens: int) -> None:
        for layer, n_tokens in enumerate(self._n_tokens):
            if n_tokens != n_ids:
                raise ValueError(
                    f"layer {layer} holds {n_tokens} tokens, token_ids {n_ids}; allowed: the same"
                )
        if not isinstance(prompt_tokens, int | np.integer) or not 1 <= prompt_tokens <= n_ids:
            raise ValueError(f"prompt_tokens is {prompt_tokens!r}; allowed: 1 to {n_ids}")

    def _sensitivity(self, n_steps: int) -> Sensitivity | None:
        if self._drawn is None and not self._sensitivities:
            return None
        sizes = {layer: own for layer, (own, _) in sorted(self._sensitivities.items())}
        drawn, record = self._drawn or ((), None)
        is_whole = set(sizes) == set(range(self.shape.n_layers)) and {*sizes.values()} == {drawn}
        if record is None or not is_whole or drawn[1] != n_steps:
            raise ValueError(
                f"sensitivities have (n_draws, n_steps) {sizes} by layer, and log_weights {drawn}; allowed: "
                f"one n_draws and {n_steps} steps in all"
            )
        files = {DRAWS_NAME: record}
        files |= {sensitivity_name(layer): own for layer, (_, own) in sorted(self._sensitivities.items())}
        return {"n_draws": drawn[0], "files": files}

    def _part(self, layer: int, name: str) -> Part:
        dtype = STORAGE_DTYPES["float32" if name == "lse" else self.shape.dtype]
        path = self._target.staging / f"layer_{layer:03d}.{name}.part"
        return Part(path, dtype, self._row_shape(name))

    def _write_files(self, ids: np.ndarray) -> dict[str, FileRecord]:
        staging = self._target.staging
        source = TensorSource(TAGS["int32"], ids.shape, [ids])
        files = {TOKENS_NAME: write_tensors(staging / TOKENS_NAME, {"token_ids": source})}
        # The 4-byte LSE first, so that every array starts at a multiple of its item size.
        names = ["lse", "queries", "keys"] + ["values"] * self.with_values
        for layer in range(self.shape.n_layers):
            parts = {name: self._part(layer, name) for name in names}
            sources = {}
            for name, part in parts.items():
                tag = TAGS["float32" if name == "lse" else self.shape.dtype]
                n_heads, *rest = part.row_shape
                shape = (n_heads, len(ids), *rest)
                sources[name] = TensorSource(tag, shape, part.by_head(len(ids)))
            files[layer_name(layer)] = write_tensors(staging / layer_name(layer), sources)
            for part in parts.values():
                part.remove()
        return files

    def _manifest(self, provenance: dict[str, Any], files: dict[str, FileRecord]) -> Manifest:
        shape = self.shape
        counts = provenance["prompt_tokens"], provenance["total_tokens"]
        return Manifest(
            trace_id=content_id(shape, self.scale, *counts, files),
            n_layers=shape.n_layers,
            n_query_heads=shape.n_query_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            scale=self.scale,
            has_values=self.with_values,
            files=files,
            **provenance,
        )


def _own_versions() -> dict[str, str]:
    return {"kvbudget": package_version(), "numpy": np.__version__, "python": platform.python_version()}
