"""Hostile changes to what a reader is given: bytes, JSON, JSON lines and TOML."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable

# Written in place of a value, as they stand: JSON writers refuse most of them. Those of one digit or word are
# plausible, so that a changed document is often accepted and has to mean what it says.
LITERALS = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "2",
        "7",
        "0.5",
        "1e-300",
        "1e308",
        "-0.0",
        '""',
        '"rkv"',
        '"x"',
    ),
    *("[]", "{}", "[1]", '["rkv"]', '{"a": 1}', '"20%"', '"128"', '"0.5"', '"<script>alert(1)</script>"'),
    *("NaN", "Infinity", "-Infinity", "1e999", str(2**31), str(2**63 - 1), str(2**63), str(2**70)),
    *("9" * 5001, '"\\ud800"', '"a\\u0000b"', '"\\u202e"', f'"{"y" * 70_000}"', '"99999999999999999999"'),
    *("[" * 80 + "]" * 80, '{"a":' * 80 + "1" + "}" * 80, "[" * 5000 + "]" * 5000, "[" * 200_000),
)
_TOML_LITERALS = (
    *(text for text in LITERALS if text not in ("null", "NaN", "Infinity", "-Infinity") and text[0] != "{"),
    *(
        "nan",
        "inf",
        "{ a = 1 }",
        "1979-05-27",
        "'20%'",
        "'512KiB'",
        "'rkv:alpha=0.5'",
        "['10%', 128]",
        "[0, 1]",
    ),
)
_MARK = "\0mark\0"


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or replace bytes at one or two places."""
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 8, 64, 400))
        drawn = rng.randbytes(rng.choice((1, 4, 12)))
        kind = rng.randrange(6)
        if kind <= 1 and content:
            flipped = bytearray(content)
            flipped[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
            content = bytes(flipped)
        else:
            content = {
                2: content[:at] + content[at + length :],
                3: content[:at],
                4: content[: at + length] + content[at:],
            }.get(kind, content[:at] + drawn + content[at:])
    return content


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """Change one or two values, names or the presence of fields of a JSON document, or its bytes."""
    if rng.random() < 0.2:
        return changed_bytes(content, rng)
    document = copy.deepcopy(json.loads(content))
    literals: list[str] = []
    for _ in range(rng.choice((1, 1, 2))):
        document = _changed_value(document, rng, literals)
    text = json.dumps(document)
    for literal in literals:
        text = text.replace(json.dumps(_MARK), literal, 1)
    if rng.random() < 0.1:
        text = _with_name_twice(text, rng)
    return text.encode("utf-8", "surrogatepass")


def changed_lines(content: bytes, rng: random.Random) -> bytes:
    """Change a line of JSON lines, repeat or drop one, or change bytes."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        return changed_bytes(content, rng)
    else:
        lines[at] = changed_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def changed_toml(content: bytes, rng: random.Random) -> bytes:
    """Put another value in the place of one, repeat, drop or rename a line, or change bytes."""
    lines = content.decode("utf-8").splitlines()
    kind, at = rng.randrange(10), rng.randrange(len(lines))
    if kind == 0:
        return changed_bytes(content, rng)
    if kind == 1:
        del lines[at]
    elif kind == 2:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif kind == 3:
        lines[at] = lines[at].replace(" =", "x =")
    elif kind == 4:
        lines.insert(rng.randrange(len(lines) + 1), f"{rng.choice('ab')} = {rng.choice(_TOML_LITERALS)}")
    else:
        # A whole value, or one inside of a list.
        values = [
            *re.finditer(
                r"(?<== )[^\n]+|(?<=[\[ ])(?:'[^']*'|\"[^\"]*\"|\d[\d.]*)(?=[,\]])", "\n".join(lines)
            )
        ]
        chosen = rng.choice(values)
        text = "\n".join(lines)
        return (text[: chosen.start()] + rng.choice(_TOML_LITERALS) + text[chosen.end() :]).encode()
    return "\n".join(lines).encode()


def _changed_value(document: object, rng: random.Random, literals: list[str]) -> object:
    """Change the document at a random place; a literal to be written leaves its mark there."""

    def literal(_: object) -> object:
        literals.append(rng.choice(LITERALS))
        return _MARK

    places: list[tuple[object, object]] = []
    waiting = [document]
    while waiting:
        owner = waiting.pop()
        items = (
            owner.items() if isinstance(owner, dict) else enumerate(owner) if isinstance(owner, list) else ()
        )
        for name, value in items:
            places.append((owner, name))
            waiting.append(value)
    if not places or rng.random() < 0.03:
        return literal(document)
    owner, name = rng.choice(places)
    assert isinstance(owner, dict | list)
    value = owner[name]  # type: ignore[index]
    changes: list[Callable[[], object]] = [
        *[lambda: literal(value)] * 3,
        lambda: _nudged(value, rng),
        lambda: [value],
        lambda: str(value),
        lambda: copy.deepcopy(rng.choice(places)[0]),
    ]
    if rng.random() < 0.2:
        del owner[name]  # type: ignore[arg-type]
        if isinstance(owner, dict) and rng.random() < 0.5:
            owner[f"{name}x"] = value
    else:
        owner[name] = rng.choice(changes)()  # type: ignore[index]
    return document


def _nudged(value: object, rng: random.Random) -> object:
    """Give a value of the same type that is close to it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value * 2, -value, value / 3))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("x", " ", "0", "é", "")) + value[at + rng.randrange(2) :]
    return value


def _with_name_twice(text: str, rng: random.Random) -> str:
    names = [*re.finditer(r'[{,] ?("[a-z_]+"): ', text)]
    if not names:
        return text
    chosen = rng.choice(names)
    return (
        f"{text[: chosen.start() + 1]}{chosen[1]}: {rng.choice(LITERALS[:20])}, {text[chosen.start() + 1 :]}"
    )
