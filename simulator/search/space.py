"""What is searched: parts of a policy, and how far each of their parameters may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import ceil
from pathlib import Path
from typing import Any

from optuna.trial import BaseTrial, FixedTrial

from simulator.budget import parse_budget
from simulator.policies.language import Policy, parse_policy
from simulator.policies.ranges import Choices, Range, Ranges
from simulator.policies.shipped import LAYER_ALLOCATORS
from simulator.results.labels import with_parameters
from traces.documents import read_toml
from traces.errors import UserError

ROLES = ("scorer", "layers", "heads")
_OPTIONS = {"scorer": "scorers", "layers": "layers", "heads": "heads"}
DEFAULT_PARTS = {
    "scorer": ("rkv", "snapkv", "snapkv-paper"),
    "layers": ("uniform", "wave", "wave-dynamic", "pyramid", "cake", "squeeze"),
    "heads": ("uniform", "utility", "adakv"),
}


@dataclass(frozen=True)
class Space:
    """All policies and budgets that a search may try.

    ``parts`` are names by role: scorer, layers, heads. ``fixed`` are parameters of every policy, such as the
    buffer; ``ranges`` go before the parts' own, by name of the parameter.
    """

    parts: Mapping[str, tuple[str, ...]]
    budgets: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ranges: Ranges = field(default_factory=dict)

    def suggest(self, trial: BaseTrial) -> tuple[str, str]:
        """Draw a policy and a budget, both as they are written on a command line."""
        budget = trial.suggest_categorical("budget", self.budgets)
        chosen = {role: trial.suggest_categorical(role, self.parts[role]) for role in ROLES}
        drawn: dict[str, Any] = {}
        for role, part in chosen.items():
            for name, default, allowed in self.parameters(role, part):
                value = _draw(trial, f"{part}.{name}", allowed, default)
                if value != default:
                    drawn[name] = value
        return write_policy(chosen, drawn), budget

    def parameters(self, role: str, part: str) -> Iterator[tuple[str, Any, Range | Choices]]:
        """List a part's parameters that have a range, with their defaults and ranges."""
        found = _part_of(role, part)
        ranges = {**found.searched, **self.ranges}
        for own in fields(found):
            if own.name in ranges and own.name not in self.fixed:
                yield own.name, getattr(found, own.name), ranges[own.name]

    def parse(self, text: str) -> Policy:
        """Read a policy with the parameters that all share.

        Raises UserError if it cannot be read, or gives a shared parameter another value.
        """
        policy = parse_policy(text, **self.fixed)
        for name, value in self.fixed.items():
            if policy.parameters.get(name, value) != value:
                found = policy.parameters[name]
                raise UserError(f"policy '{text}': {name} is {found}; allowed: {value}, as of all policies")
        return policy

    def coordinates(self, text: str, budget: str) -> dict[str, Any] | None:
        """Tell where a policy lies in the space, None if outside: a search may start from it."""
        policy = self.parse(text)
        found: dict[str, Any] = {"budget": budget}
        for role in ROLES:
            own = getattr(policy, role)
            part = next((p for p in self.parts[role] if _part_of(role, p).name == own.name), None)
            if part is None:
                return None
            found[role] = part
            for name, _, allowed in self.parameters(role, part):
                value = getattr(own, name)
                if isinstance(allowed, Choices):
                    inside = value in allowed.values
                else:
                    inside = allowed.low <= value <= allowed.high
                if not inside:
                    return None
                found[f"{part}.{name}"] = value
        # What has no range has to be at its default.
        again, _ = self.suggest(FixedTrial(found))
        return found if self.parse(again).parameters == policy.parameters else None


def make_space(
    parts: Mapping[str, list[str] | None], budgets: list[str], fixed: Mapping[str, Any], ranges: Path | None
) -> Space:
    """Check and complete what is asked to be searched.

    Raises UserError if a part is unknown, a budget cannot be read, or the file of ranges is wrong.
    """
    asked = {role: tuple(dict.fromkeys(parts.get(role) or DEFAULT_PARTS[role])) for role in ROLES}
    for role, names in asked.items():
        for name in names:
            _part_of(role, name)
    # One budget in two spellings is one.
    budgets = [str(parse_budget(budget)) for budget in budgets]
    given = read_ranges(ranges)
    known = {own.name for role in ROLES for name in asked[role] for own in fields(_part_of(role, name))}
    for name in given:
        if name not in known:
            raise UserError(f"--ranges {ranges}: '{name}' is unknown; allowed: {', '.join(sorted(known))}")
    return Space(asked, tuple(dict.fromkeys(budgets)), dict(fixed), given)


def read_ranges(path: Path | None) -> Ranges:
    """Read ranges from TOML: ``alpha = { low = 0.01, high = 0.5, log = true }`` or ``alpha = [0.1, 0.2]``.

    Raises UserError, which names the parameter.
    """
    if path is None:
        return {}
    content = read_toml(path, f"--ranges {path}")
    return {name: _read_range(path, name, value) for name, value in content.items()}


def write_policy(parts: Mapping[str, str], parameters: Mapping[str, Any]) -> str:
    """Write a policy as on a command line; uniform allocators go without saying."""
    # A head allocator that shares its name with one of layers is known by its place.
    wanted = {"layers": parts["heads"] in LAYER_ALLOCATORS and parts["heads"] != "uniform"}
    named = [parts[role] for role in ROLES if parts[role] != "uniform" or wanted.get(role)]
    return with_parameters("+".join(named), parameters)


def _read_range(path: Path, name: str, value: Any) -> Range | Choices:
    if isinstance(value, list) and value:
        return Choices(tuple(value))
    allowed = {"low", "high", "log", "step"}
    if isinstance(value, dict) and {"low", "high"} <= value.keys() <= allowed:
        numbers = [value[key] for key in ("low", "high")]
        log, step = value.get("log", False), value.get("step", 1)
        if (
            all(type(number) in (int, float) for number in numbers)
            and numbers[0] <= numbers[1]
            and type(log) is bool
            and (not log or numbers[0] > 0)
            and type(step) is int
            and step >= 1
        ):
            return Range(numbers[0], numbers[1], log, step)
    raise UserError(
        f"--ranges {path}: {name} is {value!r}; allowed: a list of values, or {{ low = 0.1, high = 0.9 }}, "
        "with log = true above 0, or a step of whole numbers"
    )


def _draw(trial: BaseTrial, name: str, allowed: Range | Choices, default: Any) -> Any:
    if isinstance(allowed, Choices):
        return trial.suggest_categorical(name, allowed.values)
    if isinstance(default, int):
        low, high = ceil(allowed.low), int(allowed.high)
        return trial.suggest_int(name, low, high, log=allowed.log, step=1 if allowed.log else allowed.step)
    # Four digits: what is written is what was tried.
    return float(f"{trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log):.4g}")


def _part_of(role: str, name: str) -> Any:
    """Read one part, with its defaults."""
    beside = {"scorer": name, "layers": f"rkv+{name}", "heads": f"rkv+uniform+{name}"}
    policy = parse_policy(beside[role])
    uniform = {other for other in ROLES[1:] if getattr(policy, other).name == "uniform"}
    if uniform != {"layers", "heads"} - ({role} if name != "uniform" else set()):
        wrong = f"--{_OPTIONS[role]}: '{name}' is another kind of part, or several"
        raise UserError(f"{wrong}; allowed: one, see sim policies list")
    return getattr(policy, role)
