"""A policy is one frozen value: scorer, layer allocator, head allocator and trigger."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from simulator.policies import (
    ALIASES,
    HEAD_ALLOCATORS,
    LAYER_ALLOCATORS,
    SCORERS,
    TRIGGERS,
    BufferFull,
    Full,
    Never,
    UniformHeads,
    UniformLayers,
)
from simulator.policies.base import HeadAllocator, LayerAllocator, Scorer, Trigger
from traces.errors import InfeasibleBudgetError, UserError

REPLAY_FIELDS = ("redistribute",)


@dataclass(frozen=True)
class Policy:
    """Who is retained, how many where, and when that is decided.

    Attributes
    ----------
    name : str
        As the user wrote it, without parameters.
    scorer, layers, heads, trigger
        The four parts; see ``simulator.policies.base``.
    redistribute : bool
        Hand budget that a head is too short to use to heads that would otherwise evict. Off, since no
        published policy does it.
    """

    name: str
    scorer: Scorer
    layers: LayerAllocator = field(default_factory=UniformLayers)
    heads: HeadAllocator = field(default_factory=UniformHeads)
    trigger: Trigger = field(default_factory=BufferFull)
    redistribute: bool = False

    @property
    def evicts(self) -> bool:
        """Whether anything can ever be evicted."""
        return not isinstance(self.trigger, Never)

    @property
    def protected(self) -> int:
        """Entries a KV head's budget has to hold whatever their scores; none if nothing is ever evicted."""
        return self.scorer.sinks + self.scorer.recent if self.evicts else 0

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter of every part with its value, by name."""
        found: dict[str, Any] = {}
        for part in (self.scorer, self.layers, self.heads, self.trigger):
            found |= part_parameters(part)
        found["trigger"] = self.trigger.name
        return found | {name: getattr(self, name) for name in REPLAY_FIELDS}

    @property
    def parameters_json(self) -> str:
        """The parameters as one line of JSON, in a fixed order."""
        return json.dumps(self.parameters, sort_keys=True)

    def require_feasible(self, entries: int) -> None:
        """Refuse a budget that leaves no entry to choose.

        Raises
        ------
        InfeasibleBudgetError
        """
        if self.evicts and entries <= self.protected:
            raise InfeasibleBudgetError(
                f"budget {entries} entries per KV head is too small for policy '{self.name}', which protects "
                f"{self.scorer.sinks} sinks and {self.scorer.recent} recent entries; "
                f"allowed: at least {self.protected + 1}"
            )


def part_parameters(part: Any) -> dict[str, Any]:
    """List one part's parameters and their values."""
    return {item.name: getattr(part, item.name) for item in fields(part)}


def split_list(text: str) -> list[str]:
    """Split a comma list of policies; ``a:x=1,y=2,b`` is ``a:x=1,y=2`` and ``b``."""
    pieces: list[str] = []
    for piece in text.split(","):
        piece = piece.strip()
        is_parameter = "=" in piece and ":" not in piece
        if is_parameter and pieces:
            pieces[-1] += f",{piece}"
        else:
            pieces.append(piece)
    return pieces


def parse_policy(text: str | Policy, **overrides: Any) -> Policy:
    """Read a policy such as ``reasonalloc``, ``rkv+wave`` or ``rkv+utility:delta=64,buffer=32``.

    Parameters
    ----------
    text : str
        ``scorer[+layers][+heads][:name=value,...]`` or an alias. ``trigger=every-n`` picks another trigger.
    **overrides
        Parameters set before those in the text, where the policy has them.

    Raises
    ------
    UserError
        For an unknown name, two parts of one kind, or a parameter that no part has or allows.
    """
    if isinstance(text, Policy):
        return text
    name, colon, tail = text.strip().partition(":")
    given = _parse_parameters(text, tail) if colon else {}
    parts = _named_parts(name)
    is_full = parts["scorer"] is Full
    trigger = given.pop("trigger", "never" if is_full else "buffer-full")
    allowed = ["never"] if is_full else list(TRIGGERS)
    if trigger not in allowed:
        raise UserError(f"policy '{text}': trigger is '{trigger}'; allowed: {', '.join(allowed)}")
    parts["trigger"] = TRIGGERS[trigger]

    names = {role: {item.name for item in fields(part)} for role, part in parts.items()}
    known = set().union(*names.values(), REPLAY_FIELDS)
    for parameter in given:
        if parameter not in known:
            raise UserError(
                f"policy '{text}': parameter '{parameter}' is unknown; allowed: "
                f"{', '.join(sorted(known | {'trigger'}))}"
            )
    values = {key: value for key, value in overrides.items() if key in known} | given
    built: dict[str, Any] = {}
    for role, part in parts.items():
        own = {key: values[key] for key in values if key in names[role]}
        built[role] = _build(text, part, own)
    redistribute = values.get("redistribute", False)
    if not isinstance(redistribute, bool):
        raise UserError(f"policy '{text}': redistribute is {redistribute!r}; allowed: true or false")
    return Policy(name, **built, redistribute=redistribute)


def _named_parts(name: str) -> dict[str, Any]:
    expanded = "+".join(ALIASES.get(piece, piece) for piece in name.split("+"))
    parts: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {
        "scorer": SCORERS,
        "layers": LAYER_ALLOCATORS,
        "heads": HEAD_ALLOCATORS,
    }
    for piece in expanded.split("+"):
        # A name such as ``uniform`` exists for layers and heads: it fills the first role still open.
        roles = [role for role, table in tables.items() if piece in table]
        if not roles:
            names = [*SCORERS, *ALIASES, *(n for t in list(tables.values())[1:] for n in t)]
            raise UserError(
                f"policy '{name}': '{piece}' is unknown; allowed: {', '.join(dict.fromkeys(names))}"
            )
        role = next((role for role in roles if role not in parts), None)
        if role is None:
            raise UserError(f"policy '{name}': '{piece}' is a second {roles[0]} part; allowed: one")
        parts[role] = tables[role][piece]
    if "scorer" not in parts:
        raise UserError(f"policy '{name}' names no scorer; allowed: {', '.join(SCORERS)}")
    return {"layers": UniformLayers, "heads": UniformHeads} | parts


def _parse_parameters(text: str, tail: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for piece in tail.split(","):
        key, value = _parse_parameter(text, piece)
        if key in given:
            raise UserError(f"policy '{text}': parameter '{key}' is given twice; allowed: once")
        given[key] = value
    return given


def _parse_parameter(text: str, piece: str) -> tuple[str, Any]:
    key, equals, raw = piece.partition("=")
    if not equals or not key.strip() or not raw.strip():
        raise UserError(f"policy '{text}': '{piece}' is not a parameter; allowed: name=value")
    raw = raw.strip()
    if raw in ("true", "false"):
        return key.strip(), raw == "true"
    for kind in (int, float):
        try:
            return key.strip(), kind(raw)
        except ValueError:
            continue
    return key.strip(), raw


def _build(text: str, part: type, values: dict[str, Any]) -> Any:
    converted = {}
    defaults = {item.name: item.default for item in fields(part)}
    for key, value in values.items():
        wanted = type(defaults[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(
                f"policy '{text}': {key} is {value!r}; allowed: "
                f"{'a whole number' if wanted is int else f'a {wanted.__name__}'}"
            )
        converted[key] = value
    try:
        return part(**converted)
    except ValueError as error:
        raise UserError(f"policy '{text}': {error}") from None
