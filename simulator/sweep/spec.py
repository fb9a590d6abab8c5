"""What a sweep's TOML file asks for: traces, and every policy with its budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from simulator.budget import Budget, parse_budget
from simulator.engine.sampling import EVERYTHING, Sampling, parse_sampling
from simulator.policies.language import REPLAY_FIELDS, Policy, parse_policy
from simulator.results.labels import with_parameters
from traces.documents import read_toml, require_known, shown
from traces.errors import UserError
from traces.seeds import require_seed

_KEYS = ("out", "traces", "policies", "budgets", "seeds", "waves", "sampling", "parameters", "grid")
_SAMPLING_KEYS = ("queries", "layers", "kv_heads")
_GRID_KEYS = ("policy", "parameters", "budgets")
# Per trace; laying them out takes some ten seconds.
_MOST_SETTINGS = 10**5


@dataclass(frozen=True)
class Setting:
    """A policy at a budget, under one seed."""

    policy: Policy
    budget: Budget
    seed: int


@dataclass(frozen=True)
class Spec:
    """A sweep as its file asks for it.

    ``out`` is the folder of results; ``traces`` are paths, folders, globs or URLs; ``waves`` files of demand
    profiles. ``settings`` are in the order of the file, policies, then their parameters, budgets and seeds,
    each once. ``sampling`` says how much of every trace is measured.
    """

    out: Path | None
    traces: tuple[str, ...]
    settings: tuple[Setting, ...]
    waves: tuple[str, ...]
    sampling: Sampling = EVERYTHING


def read_spec(path: Path) -> Spec:
    """Read a sweep's file; raises UserError, which names the key or value that is not allowed."""
    content = read_toml(path, str(path))
    try:
        return _parse(content)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def _parse(content: dict[str, Any]) -> Spec:
    require_known(content, _KEYS, "key")
    out = content.get("out")
    if out is not None and (not isinstance(out, str) or not out or "\0" in out):
        raise UserError(f"out is {shown(out)}; allowed: the name of a folder")
    traces = _strings(content, "traces")
    if not traces:
        raise UserError("traces is empty; allowed: a list of traces, folders, globs or URLs")
    seeds = _listed(content.get("seeds", [0]), "seeds")
    for seed in seeds:
        require_seed(seed, "seeds")
    settings = [
        Setting(policy, budget, seed)
        for policy, budgets in _policies(content, len(seeds))
        for budget in budgets
        for seed in seeds
    ]
    return Spec(
        out=None if out is None else Path(out),
        traces=tuple(traces),
        settings=tuple(dict.fromkeys(settings)),
        waves=tuple(_strings(content, "waves")),
        sampling=_sampling(content.get("sampling", {})),
    )


def _sampling(table: Any) -> Sampling:
    if not isinstance(table, dict):
        raise UserError(f"sampling is {shown(table)}; allowed: a table such as {{ queries = '1/8' }}")
    require_known(table, _SAMPLING_KEYS, "sampling key")
    counts = {name: table.get(name) for name in _SAMPLING_KEYS[1:]}
    for name, value in counts.items():
        if value is not None and type(value) is not int:
            raise UserError(f"sampling {name} is {shown(value)}; allowed: a whole number")
    queries = table.get("queries")
    try:
        return parse_sampling(None if queries is None else str(queries), counts["layers"], counts["kv_heads"])
    except UserError:
        raise UserError(
            f"sampling queries is {shown(queries)}; allowed: a share above 0, up to 1, such as '1/8'"
        ) from None


def _policies(content: dict[str, Any], n_seeds: int) -> Iterator[tuple[Policy, list[Budget]]]:
    """Yield every policy with its budgets, those of ``policies`` first, then those of ``grid``."""
    shared = _parameters(content.get("parameters", {}), "parameters")
    texts = _strings(content, "policies")
    grids = content.get("grid", [])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"grid is {shown(grids)}; allowed: tables [[grid]]")
    if not texts and not grids:
        raise UserError("policies is empty; allowed: a list of policies, or tables [[grid]]")
    asked = [(text, _budgets(content, "budgets")) for text in texts]
    for grid in grids:
        require_known(grid, _GRID_KEYS, "grid key")
        text = grid.get("policy")
        if not isinstance(text, str):
            raise UserError(f"grid policy is {shown(text)}; allowed: one policy")
        own = _parameters(grid.get("parameters", {}), f"grid '{text}': parameters")
        _require_size(prod(map(len, own.values())) * n_seeds)
        budgets = _budgets(grid if "budgets" in grid else content, "budgets")
        asked += [(_as_asked(text, chosen), budgets) for chosen in _choices(own)]
    unused = set(shared)
    names = {text: _names(parse_policy(text)) for text, _ in asked}
    uses = {text: {name: shared[name] for name in shared if name in own} for text, own in names.items()}
    # Counted before any is made: that takes a tenth of a millisecond each.
    _require_size(sum(prod(map(len, uses[text].values())) * len(own) for text, own in asked) * n_seeds)
    for text, budgets in asked:
        used = uses[text]
        unused -= set(used)
        for chosen in _choices(used):
            yield parse_policy(text, **chosen), budgets
    if unused:
        raise UserError(
            f"parameters has '{min(unused)}', which no policy of the sweep has; allowed: "
            f"{', '.join(sorted(set().union(*names.values())))}"
        )


def _names(policy: Policy) -> set[str]:
    own = {item.name for part in policy.parts.values() for item in fields(part)}
    return own | set(REPLAY_FIELDS)


def _as_asked(text: str, chosen: Mapping[str, Any]) -> str:
    """Write a policy with parameters, so that it is refused in the same words as on a command line."""
    return with_parameters(text, {name: _written(name, value) for name, value in chosen.items()})


def _written(name: str, value: Any) -> str:
    if isinstance(value, str) and "," in value:
        raise UserError(f"parameter {name} is {shown(value)}; allowed: text without a comma")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(parameters: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*parameters.values()):
        yield dict(zip(parameters, values, strict=True))


def _parameters(table: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(table, dict):
        raise UserError(f"{where} is {shown(table)}; allowed: a table of names and values")
    found = {name: _listed(value, f"{where} {name}") for name, value in table.items()}
    for name, values in found.items():
        for value in values:
            if not isinstance(value, bool | int | float | str):
                raise UserError(f"{where} {name} has {shown(value)}; allowed: numbers, text, true or false")
    return found


def _budgets(table: Mapping[str, Any], key: str) -> list[Budget]:
    if key not in table:
        raise UserError(f"{key} is missing; allowed: a list such as ['10%', 128, '64MiB']")
    return [parse_budget(value) for value in _listed(table[key], key)]


def _strings(content: Mapping[str, Any], key: str) -> list[str]:
    found = content.get(key, [])
    values = [found] if isinstance(found, str) else found
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise UserError(f"{key} is {shown(found)}; allowed: a list of text")
    return values


def _listed(value: Any, where: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{where} is empty; allowed: at least one value")
    return values


def _require_size(n_settings: int) -> None:
    if n_settings > _MOST_SETTINGS:
        raise UserError(
            f"asks for {n_settings} combinations of policy, parameters, budget and seed; "
            f"allowed: at most {_MOST_SETTINGS}"
        )
