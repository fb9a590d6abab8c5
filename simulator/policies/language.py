"""A policy is one frozen value: scorer, layers, heads, trigger, and what is protected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from simulator.policies.parts import HeadAllocator, LayerAllocator, Scorer, Trigger
from simulator.policies.plugins import ROLES, find_part, installed, is_users, require_sound_part, sources
from simulator.policies.protection import Protection, parse_protection
from simulator.policies.shipped import (
    ALIASES,
    HEAD_ALLOCATORS,
    LAYER_ALLOCATORS,
    SCORERS,
    TRIGGERS,
    BufferFull,
    Full,
    UniformHeads,
    UniformLayers,
)
from traces.documents import shown
from traces.errors import InfeasibleBudgetError, UserError
from traces.wording import near

REPLAY_FIELDS = ("redistribute", "protect")
TABLES: dict[str, dict[str, Any]] = {
    "scorer": SCORERS,
    "layers": LAYER_ALLOCATORS,
    "heads": HEAD_ALLOCATORS,
    "trigger": TRIGGERS,
}
# One part: a colon belongs to it between a user's file and its class only. Elsewhere parameters follow.
_PART = r"(?:[^+:,=]*\.py:[A-Za-z_]\w*(?=[+:]|$)|[^+:]*)"
_PARTS = re.compile(rf"{_PART}(?:\+{_PART})*")


@dataclass(frozen=True)
class Policy:
    """Who is retained, how many where, and when that is decided.

    Attributes
    ----------
    name : str
        As the user wrote it, without parameters.
    scorer, layers, heads, trigger
        The four parts; see ``simulator.policies.parts``.
    protect : Protection or None
        What is never evicted, if not what the scorer's paper protects.
    redistribute : bool
        Hand budget that a head is too short to use to heads that would otherwise evict. Off, since no
        published policy does it.
    trigger_name : str
        As the user wrote it, for a trigger of their own.
    """

    name: str
    scorer: Scorer
    layers: LayerAllocator = field(default_factory=UniformLayers)
    heads: HeadAllocator = field(default_factory=UniformHeads)
    trigger: Trigger = field(default_factory=BufferFull)
    protect: Protection | None = None
    redistribute: bool = False
    trigger_name: str = ""

    @property
    def parts(self) -> dict[str, Any]:
        """The four parts by role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def evicts(self) -> bool:
        """Whether anything can ever be evicted."""
        return self.trigger.evicts

    @property
    def divides_layers_again(self) -> bool:
        """Whether layer budgets are settled by what the layers hold, after the prompt and perhaps later."""
        return self.evicts and self.layers.dynamic

    @property
    def protection(self) -> Protection:
        """What is never evicted, with the prompt where the trigger keeps it."""
        scorer = self.scorer
        own = Protection(sinks=scorer.sinks, recent=scorer.recent) if self.protect is None else self.protect
        return replace(own, prompt=True) if self.trigger.prompt == "keep" else own

    def protected_of(self, prompt_tokens: int, entries: int) -> int:
        """Count what a KV head's budget has to hold whatever is scored, under a mean budget in entries.

        It is none if nothing is ever evicted.
        """
        return sum(self.protection.ends(prompt_tokens, entries)) if self.evicts else 0

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter of every part with its value, by name, and which files of the user's it read.

        Where a name has another value in a later part, that is told as ``role.name``.
        """
        found: dict[str, Any] = {}
        for role, part in self.parts.items():
            for name in (item.name for item in fields(part)):
                value = getattr(part, name)
                found[name if found.get(name, value) == value else f"{role}.{name}"] = value
        found["trigger"] = self.trigger_name or self.trigger.name
        source = sources(self.parts.values())
        if source is not None:
            found["source"] = source
        found["redistribute"] = self.redistribute
        # Rows of papers' own protection are those of versions that knew no other.
        return found if self.protect is None else found | {"protect": str(self.protect)}

    @property
    def parameters_json(self) -> str:
        """The parameters as one line of JSON, in a fixed order."""
        return json.dumps(self.parameters, sort_keys=True)

    def require_feasible(self, entries: int, prompt_tokens: int = 0) -> None:
        """Refuse a budget that leaves no entry to choose.

        Raises
        ------
        InfeasibleBudgetError
        """
        protection = self.protection
        first, last = protection.ends(prompt_tokens, entries)
        if self.evicts and entries <= first + last:
            is_prompt = protection.prompt and first == prompt_tokens
            kept = f"a prompt of {prompt_tokens}" if is_prompt else f"{first} sinks"
            raise InfeasibleBudgetError(
                f"budget {entries} entries per KV head is too small for policy '{self.name}', which protects "
                f"{kept} and {last} recent entries; allowed: at least {first + last + 1}"
            )

    def resolved(self, vocabulary: Mapping[int, str]) -> Policy:
        """Give the policy with a trigger that knows the token ids it waits for.

        Raises
        ------
        MissingDataError
            If it has to know the text of tokens and ``vocabulary`` lacks it.
        """
        return replace(self, trigger=self.trigger.resolved(vocabulary))


def split_list(text: str) -> list[str]:
    """Split a comma list of policies; ``a:x=1,y=2,b`` is ``a:x=1,y=2`` and ``b``.

    A piece with ``=``, and no colon before it, continues the policy before: values may hold colons.
    """
    pieces: list[str] = []
    for piece in text.split(","):
        piece = piece.strip()
        name, equals, _ = piece.partition("=")
        is_parameter = equals and ":" not in name
        if is_parameter and pieces:
            pieces[-1] += f",{piece}"
        else:
            pieces.append(piece)
    return pieces


def parse_policies(texts: Iterable[str], buffer: int | None = None) -> list[Policy]:
    """Read comma lists of policies; each once, with ``buffer`` where they have one and do not say otherwise.

    Raises
    ------
    UserError
        As ``parse_policy``, and if none of them has a buffer.
    """
    overrides = {} if buffer is None else {"buffer": buffer}
    found = [parse_policy(name, **overrides) for text in texts for name in split_list(text)]
    require_buffers(found, buffer)
    return list(dict.fromkeys(found))


def require_buffers(policies: Iterable[Policy], buffer: int | None) -> None:
    """Refuse a buffer for policies that have none, which would change nothing."""
    if buffer is not None and not any("buffer" in policy.parameters for policy in policies):
        raise UserError(f"--buffer is {buffer}, and no policy has a buffer; allowed: without --buffer")


def parse_policy(text: str | Policy, **overrides: Any) -> Policy:
    """Read a policy such as ``reasonalloc``, ``rkv+wave`` or ``my_policy.py:MyScorer+utility:delta=64``.

    Parameters
    ----------
    text : str
        ``scorer[+layers][+heads][:name=value,...]`` or an alias. ``trigger=every-n`` picks another trigger,
        ``protect=prompt+recent:64`` what is never evicted.
        A part may be a class in a user's file, ``path.py:Class``, or the name of an entry point.
        ``layers.window=8`` sets a parameter of one part only, ``window=8`` of all that have it.
    **overrides
        Parameters set before those in the text, where the policy has them. An alias' own come first.

    Raises
    ------
    UserError
        For an unknown name, two parts of one kind, a parameter that no part has or allows, or a user's file
        that cannot be loaded.
    """
    if isinstance(text, Policy):
        return text
    text = text.strip()
    if not text.isprintable():
        raise UserError(
            f"policy {shown(text)} has characters that cannot be printed; allowed: one line of text"
        )
    name = split_name(text)
    given = parse_parameters(text, text[len(name) + 1 :]) if len(name) < len(text) else {}
    pieces, usual = _expanded(name)
    parts = _named_parts(name, pieces)
    trigger = (usual | given).get("trigger", "never" if parts["scorer"] is Full else "buffer-full")
    parts["trigger"] = _named_trigger(text, trigger, parts["scorer"] is Full)

    names = {role: {item.name for item in fields(part)} for role, part in parts.items()}
    known = set().union(*names.values(), REPLAY_FIELDS)
    of_one_part = {f"{role}.{own}" for role in parts for own in names[role]}
    for parameter in given:
        if parameter not in known | of_one_part | {"trigger"}:
            raise UserError(
                f"policy '{text}': parameter '{parameter}' is unknown{near(parameter, known | {'trigger'})}; "
                f"allowed: {', '.join(sorted(known | {'trigger'}))}"
            )
    values = usual | {key: value for key, value in overrides.items() if key in known} | given
    built: dict[str, Any] = {}
    for role, part in parts.items():
        own = {key: values[key] for key in values if key in names[role]}
        own |= {key: values[f"{role}.{key}"] for key in names[role] if f"{role}.{key}" in values}
        built[role] = _build(text, role, part, own)
    redistribute = values.get("redistribute", False)
    if not isinstance(redistribute, bool):
        raise UserError(f"policy '{text}': redistribute is {redistribute!r}; allowed: true or false")
    found = Policy(
        name, **built, redistribute=redistribute, trigger_name="" if trigger in TRIGGERS else trigger
    )
    if "protect" not in values:
        return found
    try:
        protect = parse_protection(str(values["protect"]))
    except ValueError as error:
        raise UserError(f"policy '{text}': {error}") from None
    asked = replace(found, protect=protect)
    # What the paper protects anyway is the paper's policy.
    return found if asked.protection == found.protection else asked


def split_name(text: str) -> str:
    """Give the part of a policy's text that names its parts: all before the colon of its parameters."""
    found = _PARTS.match(text)
    return found[0] if found else text


def _expanded(name: str) -> tuple[list[str], dict[str, Any]]:
    """Replace aliases by what they stand for; the names of the parts, and the parameters that aliases set."""
    pieces: list[str] = []
    usual: dict[str, Any] = {}
    for piece in name.split("+"):
        if piece not in ALIASES:
            pieces.append(piece)
            continue
        meaning, colon, tail = ALIASES[piece].partition(":")
        pieces += meaning.split("+")
        if colon:
            usual |= parse_parameters(ALIASES[piece], tail)
    return pieces, usual


def _named_parts(name: str, pieces: list[str]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    tables = {role: table for role, table in TABLES.items() if role != "trigger"}
    for piece in pieces:
        # A name such as ``uniform`` exists for layers and heads: it fills the first role still open.
        found = {role: table[piece] for role, table in tables.items() if piece in table}
        if not found:
            found = dict([_users_part(name, piece)])
        role = next((role for role in found if role not in parts), None)
        if role is None:
            raise UserError(f"policy '{name}': '{piece}' is a second {next(iter(found))} part; allowed: one")
        parts[role] = found[role]
    if "scorer" not in parts:
        raise UserError(f"policy '{name}' names no scorer; allowed: {', '.join(SCORERS)}")
    return {"layers": UniformLayers, "heads": UniformHeads} | parts


def _users_part(name: str, piece: str) -> tuple[str, type]:
    found = find_part(piece)
    if found is None:
        if piece.endswith(".py"):
            raise UserError(f"policy '{name}': '{piece}' names a file and no class; allowed: {piece}:CLASS")
        names = [*SCORERS, *ALIASES, *LAYER_ALLOCATORS, *HEAD_ALLOCATORS, *installed()]
        listed = ", ".join(dict.fromkeys(names))
        meant = near(piece, names)
        allowed = "see sim policies list" if meant else f"allowed: {listed}, FILE.py:CLASS"
        raise UserError(f"policy '{name}': '{piece}' is unknown{meant or ';'} {allowed}")
    if found[0] == "trigger":
        raise UserError(f"policy '{name}': '{piece}' is a trigger; allowed: as a parameter, trigger={piece}")
    return found


def _named_trigger(text: str, trigger: Any, is_full: bool) -> Any:
    allowed = ["never"] if is_full else list(TRIGGERS)
    if trigger in allowed:
        return TRIGGERS[trigger]
    found = None if is_full or trigger in TRIGGERS else find_part(str(trigger))
    if found is None:
        raise UserError(
            f"policy '{text}': trigger is '{trigger}'{near(str(trigger), allowed)}; "
            f"allowed: {', '.join(allowed)}"
        )
    role, part = found
    if role != "trigger":
        raise UserError(f"policy '{text}': trigger '{trigger}' is a {ROLES[role][0]}; allowed: a trigger")
    return part


def parse_parameters(text: str, tail: str) -> dict[str, Any]:
    """Read what follows the colon of a policy ``text``: ``name=value,...``.

    Raises
    ------
    UserError
        If it is nothing of the kind, or a name is given twice.
    """
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


def _build(text: str, role: str, part: type, values: dict[str, Any]) -> Any:
    converted = {}
    defaults = {item.name: item.default for item in fields(part)}
    for key, value in values.items():
        wanted = type(defaults[key])
        if wanted is float and type(value) is int:
            value = float(value)
        elif wanted is str and type(value) in (int, float):
            value = str(value)  # a list of one number
        if type(value) is not wanted:
            raise UserError(
                f"policy '{text}': {key} is {value!r}; allowed: "
                f"{'a whole number' if wanted is int else f'a {wanted.__name__}'}"
            )
        converted[key] = value
    try:
        built = part(**converted)
    except ValueError as error:
        raise UserError(f"policy '{text}': {error}") from None
    except Exception as error:
        if not is_users(part):
            raise
        raise UserError(f"policy '{text}': {part.__name__} raised {type(error).__name__}: {error}") from error
    if is_users(part):
        require_sound_part(text, role, built)
    return built
