"""Documents from outside: what is read, and the one line for what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from traces.documents import LARGEST, MOST_NESTED, SMALLEST, parse_json, read_json, read_toml
from traces.errors import MissingDataError, UserError


@dataclass(frozen=True)
class Document:
    n: int
    shares: tuple[Annotated[float, Meta(gt=0)], ...]
    pieces: dict[int, str]
    note: str | None = None


SOUND = '{"n": 3, "shares": [1, 2.5], "pieces": {"7": "é"}}'


def refused(content: bytes | str, kind: Any = Any) -> str:
    with pytest.raises(MissingDataError) as caught:
        parse_json(content, "w.json", kind, MissingDataError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_document_becomes_its_kind() -> None:
    assert parse_json(SOUND, "w.json", Document) == Document(3, (1.0, 2.5), {7: "é"})
    assert parse_json("﻿[1]".encode(), "w.json") == [1]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("3", '"3"', "w.json: n is '3'; allowed: int"),
        ("3", "true", "w.json: n is True; allowed: int"),
        ("2.5", "-1", "w.json: shares[1] is -1; allowed: float > 0.0"),
        ('"é"', "[1]", "w.json: pieces[...] is a array; allowed: str"),
        ('"7"', '"x"', "w.json: a key of pieces is a str; allowed: int"),
        ('"n": 3, ', "", "w.json: field 'n' is missing"),
        ('"n": 3', '"n": 3, "note": {"a": 1}', "w.json: note is {'a': 1}; allowed: str | null"),
    ],
)
def test_another_kind_is_one_line(before: str, after: str, message: str) -> None:
    assert refused(SOUND.replace(before, after), Document) == message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"a": 1, "a": 1}}', "'a' stands twice"),
        ("[" * 200_000, "levels of nesting"),
        ("[" * 900 + "]" * 900, "levels of nesting"),
        ("[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1), "levels of nesting"),
        ('{"a":' * 70 + "1" + "}" * 70, "levels of nesting"),
        ("[NaN]", "finite"),
        ("-Infinity", "finite"),
        ("1e999", "finite"),
        ("9" * 5001, "5001 digits"),
        (str(LARGEST + 1), "64 bits"),
        (str(SMALLEST - 1), "64 bits"),
        ('["\\ud800"]', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        (b"\xff", "not UTF-8"),
        ('{"a":', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_out_of_bounds_is_one_line(content: bytes | str, told: str) -> None:
    assert told in refused(content)


def test_bounds_are_inclusive() -> None:
    assert parse_json(f"[{SMALLEST}, {LARGEST}]", "w.json") == [SMALLEST, LARGEST]
    parse_json("[" * MOST_NESTED + "]" * MOST_NESTED, "w.json")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a = " + "[" * 5000, "levels of nesting"),
        ("a = " + "[" * 70 + "]" * 70, "levels of nesting"),
        ("a = nan", "finite"),
        ("a = 9223372036854775808", "64 bits"),
        ("a = 1" + "0" * 5000, "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
        ("a =", "not valid TOML"),
    ],
)
def test_toml_has_the_same_bounds(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        read_toml(path, "spec.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for path, told in [(tmp_path, "directory"), (tmp_path / "x", "No such file"), ("a\0b", "no file name")]:
        with pytest.raises(UserError, match=told):
            read_json(path, "w.json")
    long = tmp_path / "long.json"
    long.write_bytes(b" " * (64 * 2**20 + 1))
    with pytest.raises(UserError, match="at most that many"):
        read_json(long, "w.json")
