"""What is known of a model's layers and heads beforehand: its wave, or numbers that the user gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from simulator.policies.parts import LayerRequest
from simulator.policies.ranges import Limit
from traces.documents import read_json
from traces.errors import MissingDataError, UserError

if TYPE_CHECKING:
    from simulator.policies.wave import Wave


def wave_of(request: LayerRequest) -> Wave:
    """Give the wave of the model that a request is for.

    Raises
    ------
    MissingDataError
        If no wave is known for the model, or it is of another shape or revision.
    UserError
        If the wave was measured on the very trace it is to be judged on.
    """
    wave = request.waves.get(request.model)
    if wave is None:
        known = ", ".join(sorted(request.waves)) or "none"
        raise MissingDataError(
            f"no wave for model '{request.model}' (known: {known}); make one from other traces of it "
            "with: sim calibrate --trace CALIBRATION --out wave.json, then pass --wave wave.json"
        )
    if wave.model_revision and request.model_revision not in ("", wave.model_revision):
        raise MissingDataError(
            f"the wave of model '{request.model}' is of revision {wave.model_revision}, the trace of "
            f"{request.model_revision}; allowed: the same"
        )
    if request.trace_id in wave.trace_ids:
        raise UserError(
            f"trace {request.trace_id[:12]} was used to calibrate the wave of model '{request.model}'; "
            "allowed: other traces of the model, or a wave from other traces with --wave"
        )
    if len(wave.demand) != request.n_layers:
        raise MissingDataError(
            f"the wave of model '{request.model}' has {len(wave.demand)} layers, the trace {request.n_layers}"
        )
    return wave


class FollowsHeadTable:
    """Base of allocators that follow a table of how much each head needs: their parameter ``head_table``."""

    files: ClassVar[tuple[str, ...]] = ("head_table",)
    head_table: str

    @property
    def needs(self) -> frozenset[str]:
        """Without a file, the model's wave."""
        return frozenset() if self.head_table else frozenset({"wave"})

    def head_numbers(self, request: LayerRequest) -> np.ndarray:
        """Give a number per KV head that says how much it needs.

        Without a file it is the entries each head needs, from the model's wave. HeadKV's own files hold
        scores of query heads, which are averaged and then summed over each GQA group.

        Returns
        -------
        float64 (n_layers, n_kv_heads), finite and not negative.

        Raises
        ------
        MissingDataError
            If the file or the wave is missing, or of another shape than the model.
        UserError
            If the file holds something else.
        """
        if not self.head_table:
            return _shaped(wave_of(request).head_demand, request, f"the wave of model '{request.model}'")
        where = f"head table {self.head_table}"
        found = read_json(self.head_table, where, error=MissingDataError)
        rows = _group_sums(found, request, where) if isinstance(found, dict) else found
        return _shaped(rows, request, where)


def layer_shares(text: str, request: LayerRequest) -> np.ndarray:
    """Give the positive number of every layer that ``text`` lists or whose file it names.

    Returns
    -------
    float64 (n_layers,)

    Raises
    ------
    MissingDataError
        If the file is missing, or there is not one number per layer.
    UserError
        If no numbers are given, or the file holds something else.
    """
    shares = listed_numbers(text)
    where = f"layer_shares {text}"
    if shares is None:
        _require_named(text, "layer_shares", "4/2/1")
        shares = _numbers(read_json(text, where, error=MissingDataError), where)
        _require_positive(shares, where)
    if len(shares) != request.n_layers:
        raise MissingDataError(
            f"{where}: {len(shares)} numbers; allowed: one for each of the {request.n_layers} layers of "
            f"model '{request.model}'"
        )
    return np.array(shares)


def head_shares(text: str, request: LayerRequest) -> np.ndarray:
    """Give the positive number of every KV head that ``text`` lists, alike in all layers, or that a file has.

    Raises as ``layer_shares``, where there is not one number per KV head.

    Returns
    -------
    float64 (n_layers, n_kv_heads)
    """
    shares = listed_numbers(text)
    where = f"head_shares {text}"
    if shares is not None:
        return _shaped([shares] * request.n_layers, request, where)
    _require_named(text, "head_shares", "2/1/1/1")
    table = _shaped(read_json(text, where, error=MissingDataError), request, where)
    _require_positive(table.ravel().tolist(), where)
    return table


def listed_numbers(text: str) -> list[float] | None:
    """Read numbers joined by ``/``; None for any other text, which is then a path."""
    try:
        return [float(piece) for piece in text.split("/")]
    except ValueError:
        return None


def _is_path_or_shares(text: str) -> bool:
    return all(0 < number < np.inf for number in listed_numbers(text) or [])


SHARES = Limit(_is_path_or_shares, "numbers above 0 joined by /, or a JSON file")


def _require_named(text: str, name: str, example: str) -> None:
    if not text:
        raise UserError(f"'custom' budgets have no {name}; allowed: {name}={example}, or a JSON file")


def _numbers(found: object, where: str) -> list[float]:
    if not isinstance(found, list) or not all(type(value) in (int, float) for value in found):
        raise UserError(f"{where} holds something else than numbers in lists")
    try:
        return [float(value) for value in found]
    except OverflowError:
        raise UserError(f"{where} holds a number too large to compute with") from None


def _require_positive(numbers: list[float], where: str) -> None:
    bad = [number for number in numbers if not (np.isfinite(number) and number > 0)]
    if bad:
        raise UserError(f"{where} holds {bad[0]:g}; allowed: finite numbers above 0")


def _shaped(rows: object, request: LayerRequest, where: str) -> np.ndarray:
    if not isinstance(rows, list | tuple):
        raise UserError(f"{where} holds something else than numbers in lists")
    table = [_numbers(list(row) if isinstance(row, tuple) else row, where) for row in rows]
    shape = request.n_layers, request.n_kv_heads
    widths = {len(row) for row in table}
    if len(table) != shape[0] or widths != {shape[1]}:
        found = f"{len(table)} layers of {' or '.join(map(str, sorted(widths))) or 'no'} KV heads"
        raise MissingDataError(f"{where}: {found}; allowed: {shape[0]} layers of {shape[1]}")
    values = np.array(table)
    if not np.isfinite(values).all() or (values < 0).any():
        raise UserError(f"{where} holds a number that is negative or not finite; allowed: 0 or more")
    return values


def _group_sums(found: dict[str, object], request: LayerRequest, where: str) -> list[list[float]]:
    """Turn scores of query heads into one number per KV head."""
    n_layers, n_kv_heads = request.n_layers, request.n_kv_heads
    n_heads = len(found) // n_layers
    names = {f"{layer}-{head}" for layer in range(n_layers) for head in range(n_heads)}
    if set(found) != names or n_heads == 0 or n_heads % n_kv_heads:
        raise MissingDataError(
            f"{where}: {len(found)} entries; allowed: one 'layer-head' for every query head of {n_layers} "
            f"layers with {n_kv_heads} KV heads"
        )
    means = {}
    for name, scores in found.items():
        numbers = _numbers(scores, where)
        if not numbers:
            raise UserError(f"{where} holds no score for head {name}; allowed: one or more")
        means[name] = float(np.mean(numbers))
    group_size = n_heads // n_kv_heads
    return [
        [
            sum(means[f"{layer}-{head}"] for head in range(first, first + group_size))
            for first in range(0, n_heads, group_size)
        ]
        for layer in range(n_layers)
    ]
