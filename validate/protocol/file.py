"""What a TOML file asks of ``sim validate protocol``: models, benchmarks, policies, and published numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simulator.budget import Budget, parse_budget
from simulator.policies.language import REPLAY_FIELDS, Policy, parse_policy
from traces.documents import read_toml, require_known, shown
from traces.errors import UserError
from validate.models.next_token import Sampling

_KEYS = ("source", "model", "policies", "parameters", "decoding", "models", "benchmarks", "published")
_DECODING_KEYS = ("temperature", "top_p", "samples", "prompt", "stretch")
_MODEL_KEYS = ("id", "wave")
_BENCHMARK_KEYS = ("prompts", "max_new_tokens", "budgets", "batch")
_PUBLISHED_KEYS = ("model", "benchmark", "budget", "accuracy", "note")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PROBLEM = "{problem}"
_FULL = "full"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model of the file: a hub id or folder, and the file of its wave."""

    id: str
    wave: str | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems and what is run on them, ``batch`` of them together, each with all its samples.

    ``prompts`` is a file or URL of JSONL or Parquet, or None where the command line has to give it.
    """

    prompts: str | None
    max_new_tokens: int
    budgets: tuple[Budget, ...]
    batch: int


@dataclass(frozen=True, slots=True)
class Published:
    """A published accuracy, as a share; no budget for the full cache."""

    model: str
    benchmark: str
    policy: Policy
    budget: Budget | None
    accuracy: float
    note: str


@dataclass(frozen=True)
class Protocol:
    """A run as its file asks for it.

    ``source`` says where the published numbers are from; ``model`` names the one that is run unless another
    is asked for. Policies have those of the ``parameters`` that they know. ``samples`` counts texts per
    problem, ``prompt`` is what is asked, with ``{problem}`` for the problem, and ``stretch`` is as in
    `LiveSettings`.
    """

    path: Path
    source: str
    model: str
    models: dict[str, Checkpoint]
    benchmarks: dict[str, Benchmark]
    policies: tuple[Policy, ...]
    parameters: dict[str, Any]
    sampling: Sampling
    samples: int
    prompt: str
    stretch: float | None
    published: tuple[Published, ...]


def read_protocol(path: Path) -> Protocol:
    """Read a file.

    Raises
    ------
    UserError
        If it cannot be read, or a key or value is not allowed; the message names file and key.
    InfeasibleBudgetError
        If a budget does not hold what a policy protects.
    """
    content = read_toml(path, str(path))
    try:
        return _parse(content, path)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def _parse(content: dict[str, Any], path: Path) -> Protocol:
    require_known(content, _KEYS, "key")
    models = {name: _checkpoint(name, table) for name, table in _tables(content, "models")}
    model = _text(content, "model")
    if model not in models:
        raise UserError(f"model is {shown(model)}; allowed: {', '.join(models)}")
    parameters = _parameters(content)
    policies = _policies(content, parameters)
    benchmarks = {name: _benchmark(name, table, policies) for name, table in _tables(content, "benchmarks")}
    decoding = _table(content.get("decoding", {}), "decoding")
    require_known(decoding, _DECODING_KEYS, "decoding key")
    sampling, samples = _sampling(decoding)
    stretch = _number(decoding, "stretch", "decoding")
    if stretch is not None and not stretch >= 1:
        raise UserError(f"decoding stretch is {stretch}; allowed: 1 or more")
    prompt = _text(decoding, "prompt", "decoding", PROBLEM)
    if PROBLEM not in prompt:
        raise UserError(f"decoding prompt is {shown(prompt)}; allowed: text with {PROBLEM} in it")
    return Protocol(
        path=path,
        source=_text(content, "source", default=""),
        model=model,
        models=models,
        benchmarks=benchmarks,
        policies=policies,
        parameters=parameters,
        sampling=sampling,
        samples=samples,
        prompt=prompt,
        stretch=stretch,
        published=tuple(_published(content, models, benchmarks, parameters)),
    )


def _checkpoint(name: str, table: Mapping[str, Any]) -> Checkpoint:
    where = f"models.{name}"
    require_known(table, _MODEL_KEYS, f"{where} key")
    wave = None if "wave" not in table else _text(table, "wave", where)
    return Checkpoint(_text(table, "id", where), wave)


def _benchmark(name: str, table: Mapping[str, Any], policies: tuple[Policy, ...]) -> Benchmark:
    where = f"benchmarks.{name}"
    require_known(table, _BENCHMARK_KEYS, f"{where} key")
    listed = table.get("budgets")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where} budgets is {shown(listed)}; allowed: a list such as [128, 1024]")
    budgets = []
    for value in listed:
        try:
            budgets.append(parse_budget(value))
            if budgets[-1].unit == "entries":
                for policy in policies:
                    policy.require_feasible(int(budgets[-1].amount))
        except UserError as error:
            raise type(error)(f"{where} budgets: {error}") from None
    return Benchmark(
        prompts=None if "prompts" not in table else _text(table, "prompts", where),
        max_new_tokens=_count(table, "max_new_tokens", where),
        budgets=tuple(dict.fromkeys(budgets)),
        batch=_count(table, "batch", where, 1),
    )


def _parameters(content: Mapping[str, Any]) -> dict[str, Any]:
    table = _table(content.get("parameters", {}), "parameters")
    for name, value in table.items():
        if not isinstance(value, bool | int | float | str):
            raise UserError(f"parameters {name} is {shown(value)}; allowed: a number, text, true or false")
    return dict(table)


def _policies(content: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[Policy, ...]:
    texts = content.get("policies")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"policies is {shown(texts)}; allowed: a list of policies")
    found = tuple(dict.fromkeys(parse_policy(text, **parameters) for text in texts))
    known = set(REPLAY_FIELDS).union(
        *({item.name for item in fields(part)} for policy in found for part in policy.parts.values())
    )
    for name in parameters:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise UserError(f"parameters has '{name}', which no policy of the file has; allowed: {allowed}")
    return found


def _sampling(decoding: Mapping[str, Any]) -> tuple[Sampling, int]:
    """Read how texts are drawn, and how many of each problem."""
    temperature, top_p = (_number(decoding, name, "decoding") for name in ("temperature", "top_p"))
    samples = _count(decoding, "samples", "decoding", 1)
    if temperature is None:
        if top_p is not None or samples > 1:
            what = "top_p" if top_p is not None else f"samples = {samples}"
            raise UserError(f"decoding has {what} without temperature: greedy texts are all the same")
        return Sampling(), 1
    try:
        return Sampling(True, temperature, 1.0 if top_p is None else top_p), samples
    except UserError as error:
        raise UserError(f"decoding {error}") from None


def _published(
    content: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    benchmarks: Mapping[str, Benchmark],
    parameters: Mapping[str, Any],
) -> Iterator[Published]:
    listed = content.get("published", [])
    if not isinstance(listed, list):
        raise UserError(f"published is {shown(listed)}; allowed: tables [[published]]")
    taken = set()
    for number, row in enumerate(listed, start=1):
        where = f"published {number}"
        table = _table(row, where)
        require_known(table, _PUBLISHED_KEYS, f"{where} key")
        for key, known in (("model", models), ("benchmark", benchmarks)):
            if table.get(key) not in known:
                raise UserError(f"{where} {key} is {shown(table.get(key))}; allowed: {', '.join(known)}")
        if "budget" not in table:
            raise UserError(f"{where} budget is missing; allowed: a budget, or '{_FULL}' for the full cache")
        budget = None if table["budget"] == _FULL else parse_budget(table["budget"])
        note = _text(table, "note", where, "")
        accuracies = _table(table.get("accuracy"), f"{where} accuracy")
        for name in accuracies:
            policy = parse_policy(name, **parameters)
            if policy.evicts == (budget is None):
                other = "a policy that evicts has a budget" if policy.evicts else f"its budget is '{_FULL}'"
                raise UserError(f"{where} accuracy has '{name}' at budget {shown(table['budget'])}; {other}")
            percent = _number(accuracies, name, f"{where} accuracy")
            if percent is None or not 0 <= percent <= 100:
                raise UserError(f"{where} accuracy {name} is {percent}; allowed: percent, 0 to 100")
            cell = table["model"], table["benchmark"], policy, budget
            if cell in taken:
                raise UserError(f"{where} accuracy {name} is given before; allowed: once")
            taken.add(cell)
            yield Published(*cell, round(percent / 100, 8), note)


def _tables(content: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = content.get(key)
    if not isinstance(found, dict) or not found:
        raise UserError(f"{key} is {shown(found)}; allowed: tables [{key}.NAME]")
    for name in found:
        # Folders of results have these names.
        if not _NAME.fullmatch(name):
            raise UserError(f"{key} has {shown(name)}; allowed: names of letters, digits and . _ -")
    return [(name, _table(table, f"{key}.{name}")) for name, table in found.items()]


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; allowed: a table")
    return value


def _text(table: Mapping[str, Any], key: str, where: str = "", default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or (not value and default is None):
        raise UserError(f"{where} {key} is {shown(value)}; allowed: text".lstrip())
    return value


def _count(table: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = table.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{where} {key} is {shown(value)}; allowed: a whole number, 1 or more")
    return value


def _number(table: Mapping[str, Any], key: str, where: str) -> float | None:
    value = table.get(key)
    if value is not None and type(value) not in (int, float):
        raise UserError(f"{where} {key} is {shown(value)}; allowed: a number")
    return None if value is None else float(value)
