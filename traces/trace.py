"""One recorded full-cache run, mapped into memory and converted on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from traces.container import TensorLayout, map_tensor
from traces.errors import MissingDataError, TraceError
from traces.manifest import DRAWS_NAME, TOKENS_NAME, Manifest, layer_name, sensitivity_dtype, sensitivity_name
from traces.numbers import to_float32
from traces.shape import ModelShape

ARRAY_NAMES = ("queries", "keys", "lse", "values")

__all__ = ["ARRAY_NAMES", "Manifest", "Trace"]


@dataclass(frozen=True, repr=False)
class Trace:
    """An opened trace: what attention saw at every token of one full-cache run.

    Queries and keys are those after RoPE, so that ``exp(scale * q_t . k_j - lse_t)`` is the
    full-cache attention weight of token ``t`` on position ``j``. Nothing is read until asked for;
    what is returned as float32 is a new array that the caller owns.

    Attributes
    ----------
    path : Path
        The directory ``NAME.kvtrace``.
    manifest : Manifest
    layouts : mapping of str to mapping of str to TensorLayout
        Where each array of each file lies.
    """

    path: Path
    manifest: Manifest
    layouts: Mapping[str, Mapping[str, TensorLayout]] = field(compare=False)

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {self.shape}, total_tokens={self.total_tokens})"

    @property
    def shape(self) -> ModelShape:
        """Return the sizes of the model's attention."""
        return self.manifest.shape

    @property
    def trace_id(self) -> str:
        """Return the sha256 of the content."""
        return self.manifest.trace_id

    @property
    def model(self) -> str:
        """Return the model's name."""
        return self.manifest.model

    @property
    def scale(self) -> float:
        """Return the attention scale."""
        return self.manifest.scale

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens that were prefilled."""
        return self.manifest.prompt_tokens

    @property
    def total_tokens(self) -> int:
        """Return the number of tokens of prompt and completion."""
        return self.manifest.total_tokens

    @property
    def has_values(self) -> bool:
        """Tell whether the trace holds values."""
        return self.manifest.has_values

    @property
    def has_sensitivity(self) -> bool:
        """Tell whether the trace holds sensitivities."""
        return self.manifest.sensitivity is not None

    @property
    def token_ids(self) -> np.ndarray:
        """Return the token ids, int32 (total_tokens,)."""
        return np.array(self._map(TOKENS_NAME, "token_ids"))

    def queries(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return queries of tokens ``start`` to ``stop``, float32 (n_query_heads, n, head_dim)."""
        return self._converted(layer, "queries", start, stop)

    def keys(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return keys of tokens ``start`` to ``stop``, float32 (n_kv_heads, n, head_dim)."""
        return self._converted(layer, "keys", start, stop)

    def values(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return values of tokens ``start`` to ``stop``, float32 (n_kv_heads, n, head_dim).

        Raises
        ------
        MissingDataError
            If the trace was recorded without values.
        """
        return self._converted(layer, "values", start, stop)

    def sensitivity(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return how predictions depend on what the heads of a layer give, at decode steps.

        Each draw took one token at random at every decode step. Its sensitivity is the gradient of the sum
        of their log-probabilities by the output of every query head.

        Parameters
        ----------
        layer : int
        start, stop : int
            Decode steps, from 0; all of them by default.

        Returns
        -------
        float32 (n_draws, n_query_heads, n, head_dim)

        Raises
        ------
        MissingDataError
            If the trace was recorded without.
        """
        n_steps = self.total_tokens - self.prompt_tokens
        stop = n_steps if stop is None else stop
        if not 0 <= start <= stop <= n_steps:
            raise ValueError(f"steps {start} to {stop} asked; allowed: a span of 0 to {n_steps}")
        stored = self.stored_sensitivity(layer)[:, :, start:stop]
        return to_float32(stored, sensitivity_dtype(self.manifest.dtype))

    @property
    def draw_log_weights(self) -> np.ndarray:
        """Return how much more likely the model's prediction makes each drawn token than the draw did.

        Returns
        -------
        float32 (n_draws, n_steps)
            Logarithms of the ratio of both probabilities.

        Raises
        ------
        MissingDataError
            If the trace was recorded without sensitivities.
        """
        self._require_sensitivity()
        return to_float32(self._map(DRAWS_NAME, "log_weights"), "float32")

    def lse(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return log-sum-exps of tokens ``start`` to ``stop``, float32 (n_query_heads, n)."""
        start, stop = self._check_span(start, stop)
        return to_float32(self.stored(layer, "lse")[:, start:stop], "float32")

    def stored(self, layer: int, name: str) -> np.ndarray:
        """Map an array as it is stored, read-only and without a copy.

        Parameters
        ----------
        layer : int
            From 0 to ``n_layers - 1``.
        name : str
            ``queries``, ``keys``, ``lse`` or ``values``.

        Returns
        -------
        np.ndarray
            float16 as float16, bfloat16 as uint16 bit patterns, LSE as float32.

        Raises
        ------
        ValueError
            If there is no such layer or name.
        MissingDataError
            If the trace was recorded without values.
        TraceError
            If the file changed since the trace was opened.
        """
        if not 0 <= layer < self.manifest.n_layers:
            raise ValueError(f"layer is {layer}; allowed: 0 to {self.manifest.n_layers - 1}")
        if name not in ARRAY_NAMES:
            raise ValueError(f"name is {name!r}; allowed: {', '.join(ARRAY_NAMES)}")
        if name == "values" and not self.has_values:
            raise MissingDataError(
                f"{self.path}: the trace holds no values; needed: one recorded with values"
            )
        return self._map(layer_name(layer), name)

    def stored_sensitivity(self, layer: int) -> np.ndarray:
        """Map a layer's sensitivities as they are stored: bfloat16 as uint16 bit patterns, or float32.

        Raises
        ------
        ValueError
            If there is no such layer.
        MissingDataError
            If the trace was recorded without.
        TraceError
            If the file changed since the trace was opened.
        """
        if not 0 <= layer < self.manifest.n_layers:
            raise ValueError(f"layer is {layer}; allowed: 0 to {self.manifest.n_layers - 1}")
        self._require_sensitivity()
        return self._map(sensitivity_name(layer), "sensitivity")

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Keep the files of all layers mapped and open, so that what was looked at need not be found again.

        Raises
        ------
        TraceError
            If a file is gone or changed since the trace was opened.
        """
        kept = [self.stored(layer, "keys") for layer in range(self.manifest.n_layers)]
        try:
            yield
        finally:
            kept.clear()

    def text(self, start: int = 0, stop: int | None = None) -> str:
        """Return the text of tokens ``start`` to ``stop``; their ids if there is no vocabulary."""
        start, stop = self._check_span(start, stop)
        token_ids = self.token_ids[start:stop].tolist()
        vocabulary = self.manifest.vocabulary
        if not vocabulary:
            return " ".join(str(token_id) for token_id in token_ids)
        return "".join(vocabulary.get(token_id, f"<{token_id}>") for token_id in token_ids)

    def _converted(self, layer: int, name: str, start: int, stop: int | None) -> np.ndarray:
        start, stop = self._check_span(start, stop)
        return to_float32(self.stored(layer, name)[:, start:stop], self.manifest.dtype)

    def _require_sensitivity(self) -> None:
        if not self.has_sensitivity:
            raise MissingDataError(
                f"{self.path}: the trace holds no sensitivities; needed: one recorded with --sensitivity"
            )

    def _check_span(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.total_tokens if stop is None else stop
        if not 0 <= start <= stop <= self.total_tokens:
            raise ValueError(f"tokens {start} to {stop} asked; allowed: a span of 0 to {self.total_tokens}")
        return start, stop

    def _map(self, file_name: str, name: str) -> np.ndarray:
        path = self.path / file_name
        try:
            size = path.stat().st_size
            if size != self.manifest.all_files[file_name]["size"]:
                raise TraceError(f"{path}: {size} bytes found; it changed since it was opened")
            return map_tensor(path, self.layouts[file_name][name])
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
