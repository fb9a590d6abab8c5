"""Documents from outside, JSON and TOML: read within bounds, and refused in one line.

A document has at most so many bytes and ``MOST_NESTED`` levels, no name twice in one object, finite numbers,
whole numbers within 64 bits, and text that can be written as UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from traces.errors import UserError

Kind = TypeVar("Kind")

MOST_BYTES = 64 * 2**20
MOST_NESTED = 64
_CHUNK_BYTES = 2**20
# The range of a signed 64-bit number, as tables hold it.
SMALLEST, LARGEST = -(2**63), 2**63 - 1


class _Refused(ValueError):
    """What a document may not be; the message says what was found and what is allowed."""


def read_document(path: Path | str, what: str, error: type[UserError], most_bytes: int = MOST_BYTES) -> bytes:
    """Read a file whole.

    Parameters
    ----------
    path : Path or str
    what : str
        What messages call it, such as ``wave runs/wave.json``.
    error : type of UserError
        What is raised.
    most_bytes : int
        A longer file is refused, before it fills the memory.

    Raises
    ------
    UserError
        As ``error``, if the file cannot be read or is too long.
    """
    try:
        with Path(path).open("rb") as file:
            content = b""
            # Not in one call, which takes the memory of all that it may read.
            while len(content) <= most_bytes and (chunk := file.read(_CHUNK_BYTES)):
                content += chunk
    except OSError as failed:
        raise error(f"{what}: cannot be read: {failed.strerror}") from None
    except ValueError:  # a NUL character
        raise error(f"{what}: cannot be read: {shown(str(path))} is no file name") from None
    if len(content) > most_bytes:
        raise error(f"{what}: more than {most_bytes} bytes found; allowed: at most that many")
    return content


def read_json(
    path: Path | str, what: str, kind: type[Kind] | Any = Any, error: type[UserError] = UserError
) -> Any:
    """Read a JSON file as a ``kind``; parameters and errors as in `read_document` and `parse_json`."""
    return parse_json(read_document(path, what, error), what, kind, error)


def parse_json(content: bytes | str, what: str, kind: Any = Any, error: type[UserError] = UserError) -> Any:
    """Read JSON as a ``kind``.

    Parameters
    ----------
    content : bytes or str
        UTF-8 if bytes; a byte order mark is passed over.
    what : str
        What messages call the document.
    kind : type
        What is returned, such as ``list[float]`` or a dataclass; types are not converted to each other, but a
        whole number may stand for a float.
    error : type of UserError
        What is raised.

    Raises
    ------
    UserError
        As ``error``, if it is no JSON, out of the bounds of this module, or not of that kind.
    """

    def load(text: str) -> Any:
        return json.loads(text, object_pairs_hook=_once_each, parse_int=_whole_number)

    return _read(content, load, "JSON", what, kind, error)


def read_toml(path: Path | str, what: str, kind: Any = Any, error: type[UserError] = UserError) -> Any:
    """Read a TOML file as a ``kind``; parameters and errors as in `read_document` and `parse_json`."""
    return _read(read_document(path, what, error), tomllib.loads, "TOML", what, kind, error)


def convert(found: object, what: str, kind: Any, error: type[UserError] = UserError) -> Any:
    """Take what was read as a ``kind``; parameters and errors as in `parse_json`."""
    try:
        return msgspec.convert(found, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as refused:
        raise error(f"{what}: {_refusal(str(refused), found)}") from None


def digest(content: Mapping[str, Any], without: str = "") -> str:
    """Return the sha256 of an object's fields but one, as JSON in ASCII without blanks, names sorted."""
    rest = {name: value for name, value in content.items() if name != without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def require_known(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a key that means nothing.

    Raises
    ------
    UserError
    """
    for key in table:
        if key not in known:
            raise UserError(f"{what} {shown(key)} is unknown; allowed: {', '.join(known)}")


def shown(value: object) -> str:
    """Write a value in one short line, whatever it holds."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits cannot even be printed, nor can lists in lists without end.
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(
    content: bytes | str, load: Callable[[str], Any], form: str, what: str, kind: Any, error: type[UserError]
) -> Any:
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        found = load(text)
        _require_bounded(found)
    except _Refused as refused:
        raise error(f"{what}: {refused}") from None
    except UnicodeDecodeError as failed:
        raise error(
            f"{what}: not UTF-8 text: byte {failed.start} is {failed.object[failed.start]:#x}"
        ) from None
    except RecursionError:
        raise error(f"{what}: {_TOO_DEEP}") from None
    except ValueError as failed:
        raise error(f"{what}: not valid {form}: {failed}") from None
    return convert(found, what, kind, error)


_TOO_DEEP = f"more than {MOST_NESTED} levels of nesting found; allowed: at most that many"


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _Refused(f"{shown(twice)} stands twice in one object; allowed: once")
    return found


def _whole_number(digits: str) -> int:
    # Before Python reads them: it refuses thousands of digits in words of its own.
    if len(digits) > 20:
        raise _Refused(f"a whole number of {len(digits.lstrip('-'))} digits found; allowed: 64 bits")
    return int(digits)


def _require_bounded(document: object) -> None:
    """Refuse what is too deep, or a number or text that cannot be kept; without recursion."""
    level, depth = [document], 0
    while level:
        below: list[object] = []
        for value in level:
            if isinstance(value, dict | list) and depth == MOST_NESTED:
                raise _Refused(_TOO_DEEP)
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and not SMALLEST <= value <= LARGEST:
                raise _Refused(f"the whole number {value:.0e} found; allowed: 64 bits")
            elif isinstance(value, float) and not math.isfinite(value):
                raise _Refused(f"{value} found; allowed: finite numbers")
            elif isinstance(value, str) and not value.isascii():
                _require_writable(value)
        level, depth = below, depth + 1


def _require_writable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Refused(f"the text {shown(text)} has half of a character (a lone surrogate)") from None


# What msgspec writes.
_NAMED = re.compile(r"Object (?:contains )?(?P<fault>missing|unknown)(?: required)? field `(?P<name>.*)`")
_MISMATCH = re.compile(r"(?P<message>.*?)(?: - at (?P<key>`key` in )?`\$?(?P<path>.*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(?P<allowed>[^`]*)`(?P<bounds>(?! *, got).*?)?(?:, got `(?P<found>.*)`)?")


def _refusal(message: str, document: object) -> str:
    """Put what msgspec says of a document into the words of all other refusals."""
    found = _MISMATCH.fullmatch(message)
    assert found is not None
    place = (found["path"] or "").lstrip(".")
    expected = _EXPECTED.fullmatch(found["message"])
    if expected is None:
        named = _NAMED.fullmatch(found["message"])
        said = found["message"] if named is None else f"field '{named['name']}' is {named['fault']}"
        return f"{place}: {said}" if place else said
    allowed = f"{expected['allowed']}{expected['bounds'] or ''}"
    if found["key"] or "[...]" in place:
        value = f"a {expected['found']}" if expected["found"] else "something else"
    else:
        value = shown(_at(document, place))
    where = f"a key of {place or 'it'}" if found["key"] else place or "the whole"
    return f"{where} is {value}; allowed: {allowed}"


def _at(document: Any, place: str) -> object:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        document = document[int(index)] if index else document[name]
    return document
