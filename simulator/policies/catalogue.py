"""What policies and parts there are, and what each does: read from the classes and their docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, fields
from typing import Any

from simulator.policies.language import TABLES, parse_policy, split_name
from simulator.policies.plugins import ROLES, find_part, installed, sources
from simulator.policies.shipped import ALIASES
from traces.errors import UserError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a part: its value, its default, and what the docstring says of it."""

    name: str
    value: Any
    default: Any
    meaning: str


@dataclass(frozen=True, slots=True)
class Card:
    """All there is to say of a part.

    Attributes
    ----------
    role : str
        scorer, layer allocator, head allocator or trigger.
    name, summary, source : str
    code : str or None
        For a user's part: its file and digest.
    needs : list of str
        What has to be there beside queries and keys.
    parameters : list of Parameter
    notes, references : str
        Sections of the docstring, with known deviations from published code.
    """

    role: str
    name: str
    summary: str
    source: str
    code: str | None
    needs: list[str]
    parameters: list[Parameter]
    notes: str
    references: str


def listing() -> dict[str, list[dict[str, str]]]:
    """List everything by kind; each with its name, summary and source."""
    groups = {
        f"{ROLES[role][0]}s": [
            {"name": name, "summary": _summary(part), "source": part.source} for name, part in table.items()
        ]
        for role, table in TABLES.items()
    }
    groups["aliases"] = [
        {"name": name, "summary": meaning, "source": ""} for name, meaning in ALIASES.items()
    ]
    found = [_of_package(name) for name in sorted(installed())]
    return groups | ({"of installed packages": found} if found else {})


def cards(text: str) -> list[Card]:
    """Describe a policy by its four parts, or a part in every role in which its name exists.

    Raises
    ------
    UserError
        If there is no such policy or part.
    """
    if text in TABLES["scorer"] or text in ALIASES or "+" in text or split_name(text) != text:
        return _of_policy(text)
    roles = [(role, table[text]) for role, table in TABLES.items() if text in table]
    if not roles:
        found = find_part(text)
        if found is None or found[0] == "scorer":
            return _of_policy(text)
        roles = [found]
    return [_card(role, part(), part.name if text in TABLES[role] else text) for role, part in roles]


def list_text(width: int) -> str:
    """Write the listing for a terminal of so many columns."""
    groups = listing()
    widest = max(len(entry["name"]) for group in groups.values() for entry in group)
    lines = _wrapped(
        "A policy is a scorer, an alias, or scorer+layers+heads: rkv+wave, snapkv+pyramid+utility. "
        "Parameters follow a colon: rkv:alpha=0.3,buffer=64; protect=prompt+recent:64 says what is never "
        "evicted. A part of your own is FILE.py:CLASS. "
        "sim policies show NAME tells all of one.",
        width,
    )
    for title, entries in groups.items():
        lines += ["", title]
        for entry in entries:
            source = f" [{entry['source']}]" if entry["source"] else ""
            name = f"  {entry['name']:{widest}}  "
            lines += _wrapped(f"{entry['summary']}{source}", width, name, " " * len(name))
    return "\n".join(lines)


def show_text(text: str, width: int) -> str:
    """Write what a policy or part is for a terminal of so many columns."""
    shown = [text + (f" = {ALIASES[text]}" if text in ALIASES else "")]
    for card in cards(text):
        shown += ["", f"{card.role}: {card.name}", *_wrapped(card.summary, width, "  ")]
        told = {"source": card.source, "code": card.code or "", "needs": ", ".join(card.needs)}
        for title, value in told.items():
            shown += _wrapped(value, width, f"  {title}: ") if value else []
        if card.parameters:
            shown += ["  parameters"]
        settings = [_setting(parameter) for parameter in card.parameters]
        column = min(28, max(map(len, settings), default=0)) + 6
        for setting, parameter in zip(settings, card.parameters, strict=True):
            head = f"    {setting}".ljust(column)
            if len(head) > column:  # a long value: its meaning goes below
                shown += [head]
                head = " " * column
            shown += _wrapped(parameter.meaning, width, head, " " * column) or [head.rstrip()]
        for title, section in {"notes": card.notes, "references": card.references}.items():
            for number, paragraph in enumerate(section.split("\n\n") if section else []):
                shown += [f"  {title}"] if number == 0 else [""]
                shown += _wrapped(paragraph, width, "    ")
    return "\n".join(shown)


def _of_policy(text: str) -> list[Card]:
    policy = parse_policy(text)
    names = dict.fromkeys(ROLES, "")
    for piece in split_name(text).split("+"):
        found = find_part(piece) if piece not in ALIASES else None
        if found is not None and not any(piece in table for table in TABLES.values()):
            names[found[0]] = piece
    names["trigger"] = policy.trigger_name
    return [_card(role, part, names[role] or part.name) for role, part in policy.parts.items()]


def _of_package(name: str) -> dict[str, str]:
    try:
        found = find_part(name)
    except UserError as error:
        return {"name": name, "summary": str(error), "source": ""}
    assert found is not None
    role, part = found
    return {"name": name, "summary": f"{ROLES[role][0]}: {_summary(part)}", "source": installed()[name].value}


def _card(role: str, part: Any, name: str) -> Card:
    sections = _sections(type(part))
    return Card(
        role=ROLES[role][0],
        name=name,
        summary=_plain(sections.get("", "").split("\n\n")[0]),
        source=part.source,
        code=sources([part]),
        needs=_needs(part),
        parameters=[
            Parameter(item.name, getattr(part, item.name), item.default, _meaning(type(part), item.name))
            for item in fields(part)
        ],
        notes=_plain(sections.get("Notes", "")),
        references=_plain(sections.get("References", "")),
    )


def _needs(part: Any) -> list[str]:
    words = {
        "rope": "the model's RoPE parameters",
        "values": "values (a trace recorded with --values)",
        "wave": "a wave of the model (sim calibrate)",
    }
    return [words[need] for need in sorted(part.needs)]


def _summary(part: type) -> str:
    return _plain(_sections(part).get("", "").split("\n")[0])


def _sections(part: type) -> dict[str, str]:
    """Cut a class's own docstring at its underlined titles; what comes first has no title."""
    text = inspect.cleandoc(part.__dict__.get("__doc__") or "")
    if text.startswith(f"{part.__name__}("):
        return {}  # no docstring: a dataclass wrote its signature there
    pieces = re.split(r"^(\w[\w ]*)\n-{3,}\n", text, flags=re.MULTILINE)
    return {"": pieces[0].strip()} | {
        title: body.strip() for title, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def _meaning(part: type, parameter: str) -> str:
    """Find what the docstring of a class, or of the nearest base that has it, says of a parameter."""
    for base in part.__mro__:
        body = _sections(base).get("Attributes", "")
        for entry in re.split(r"\n(?=\S)", body):
            head, _, told = entry.partition("\n")
            if parameter in re.split(r"[,\s]+", head.partition(":")[0].strip()) and told:
                return _plain(inspect.cleandoc(told))
        if isinstance(base.__dict__.get(parameter), property):
            return _plain(inspect.getdoc(base.__dict__[parameter]) or "")
    return ""


def _plain(text: str) -> str:
    """Join the lines of every paragraph, and mark code as terminals do."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).replace("``", "`")


def _setting(parameter: Parameter) -> str:
    def written(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return "''" if value == "" else str(value)

    setting = f"{parameter.name} = {written(parameter.value)}"
    if parameter.value != parameter.default:
        setting += f" (default {written(parameter.default)})"
    return setting


def _wrapped(text: str, width: int, first: str = "", later: str | None = None) -> list[str]:
    later = " " * (len(first) - len(first.lstrip())) if later is None else later
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
    )
