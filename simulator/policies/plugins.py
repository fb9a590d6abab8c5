"""Policies that users bring: a class in a file (``my_policy.py:MyScorer``) or in an installed package."""

from __future__ import annotations

import copyreg
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from simulator.policies.parts import (
    PROMPT_MODES,
    SLOT_ORDERS,
    HeadAllocator,
    LayerAllocator,
    PolicyError,
    Scorer,
    Trigger,
)
from simulator.policies.ranges import Limit, one_of
from traces.errors import UserError

ENTRY_POINTS = "kvbudget.policies"
# The four parts of a policy, by their field in ``Policy``: what each is called, and its base class.
ROLES: dict[str, tuple[str, type]] = {
    "scorer": ("scorer", Scorer),
    "layers": ("layer allocator", LayerAllocator),
    "heads": ("head allocator", HeadAllocator),
    "trigger": ("trigger", Trigger),
}
_BASES = ", ".join(base.__name__ for _, base in ROLES.values())
# What rows call other things: a parameter of such a name would hide it.
_RESERVED = ("name", "source", "trigger", "redistribute", "protect")
_PARAMETER_TYPES = (bool, int, float, str)
# The code of every file loaded, by the name of its module.
_LOADED: dict[str, bytes] = {}


def find_part(text: str) -> tuple[str, type] | None:
    """Find a user's part by ``path/to/file.py:Class`` or the name of an entry point.

    Returns
    -------
    (role, class), the role being a key of ``ROLES``, or None if ``text`` is neither.

    Raises
    ------
    UserError
        If the file or package cannot be loaded, or the class is no sound part of a policy.
    """
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        found = _class_of(_module(text, Path(path)), text, path, name)
    elif text in installed():
        found = _load_installed(installed()[text])
    else:
        return None
    return _role(text, found), found


@cache
def installed() -> dict[str, EntryPoint]:
    """List the entry points that installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def is_users(part: object) -> bool:
    """Say whether a part, or the class of one, is not one of those that ship with the simulator."""
    return (part if isinstance(part, type) else type(part)).__module__.partition(".")[0] != "simulator"


def sources(parts: Iterable[Any]) -> str | None:
    """Say which files of the user's made the parts: name and digest of each; None if there is none.

    These are the files of their classes, not what those import, and the files that parameters name.
    """
    parts = list(parts)
    found = [_source(type(part)) for part in parts if is_users(part)]
    named = [getattr(part, name) for part in parts for name in part.files]
    found += [_file_digest(Path(path)) for path in named if os.path.isfile(path)]
    return ", ".join(dict.fromkeys(source for source in found if source)) or None


def require_sound_part(text: str, role: str, part: Any) -> None:
    """Refuse a user's part whose attributes are not what the simulator reads.

    Raises
    ------
    UserError
    """
    for name, limit in _attributes(role).items():
        try:
            value = getattr(part, name)
        except Exception as error:
            raise UserError(f"policy '{text}': {name} raised {_told(error)}") from error
        if not limit.allows(value):
            raise UserError(f"policy '{text}': {name} is {value!r}; allowed: {limit.words}")


def failure(parts: Iterable[object], error: BaseException) -> PolicyError | None:
    """Put what was raised in a replay into words, if a user's part may have caused it; else None."""
    users = [part for part in parts if is_users(part)]
    if not users:
        return None
    files = {inspect.getfile(type(part)) for part in users if _source(type(part))}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename in files), frames[-1])
    names = ", ".join(f"'{getattr(part, 'name', type(part).__name__)}'" for part in users)
    return PolicyError(f"{names} failed: {_told(error)} ({Path(frame.filename).name}, line {frame.lineno})")


def _attributes(role: str) -> dict[str, Limit]:
    count = Limit(lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")
    truth = Limit(lambda value: type(value) is bool, "true or false")
    if role == "scorer":
        return {
            **dict.fromkeys(("window", "sinks", "recent"), count),
            **dict.fromkeys(("sees_span", "stateful"), truth),
            "slot_order": one_of(SLOT_ORDERS),
            "needs": Limit(
                lambda value: isinstance(value, frozenset) and value <= {"values", "rope"},
                "a frozenset of 'values', 'rope'",
            ),
        }
    if role == "layers":
        return dict.fromkeys(("layer_delta", "window"), count) | dict.fromkeys(("dynamic", "exact"), truth)
    return {"delta": count} if role == "heads" else {"prompt": one_of(PROMPT_MODES)}


def _module(text: str, path: Path) -> ModuleType:
    """Run a user's file, once for the same path and content."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"policy '{text}': file {path} is missing; allowed: an existing file") from None
    except OSError as error:
        raise UserError(f"policy '{text}': {path} cannot be read: {error.strerror}") from None
    return _run(path.resolve(), content)


def _run(path: Path, content: bytes) -> ModuleType:
    # Not by importlib: it would trust compiled code of the same second and size, and leave a __pycache__.
    # By path and content, so that the same text gives the same class and an edited file gives another one.
    name = f"kvbudget_user_{sha256(str(path).encode() + content).hexdigest()[:16]}"
    if name in _LOADED:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else str(path)
        raise UserError(f"{where}: {_told(error)}") from error
    _LOADED[name] = content
    for part in _own_classes(module):
        if issubclass(part, tuple(base for _, base in ROLES.values())):
            copyreg.pickle(part, _reduce)
    return module


def _reduce(part: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Pickle a part with its code: another process runs the same, even if the file was edited since."""
    module = sys.modules[type(part).__module__]
    values = {item.name: getattr(part, item.name) for item in fields(part) if item.init}
    return _restore, (str(module.__file__), _LOADED[module.__name__], type(part).__name__, values)


def _restore(path: str, content: bytes, name: str, values: Mapping[str, Any]) -> Any:
    return getattr(_run(Path(path), content), name)(**values)


def _own_classes(module: ModuleType) -> list[type]:
    return [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]


def _class_of(module: ModuleType, text: str, path: str, name: str) -> type:
    own = {part.__name__: part for part in _own_classes(module)}
    if name not in own:
        raise UserError(f"policy '{text}': {path} has no class '{name}'; allowed: {', '.join(own) or 'none'}")
    return own[name]


def _load_installed(point: EntryPoint) -> type:
    package = point.dist.name if point.dist else "?"
    try:
        found = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(
            f"policy '{point.name}' of package {package}: {point.value} raised {_told(error)}"
        ) from error
    if not inspect.isclass(found):
        raise UserError(f"policy '{point.name}' of package {package}: {point.value} is no class")
    return found


def _role(text: str, part: type) -> str:
    """Tell a class's role by its base class, and refuse one that is no sound part.

    Raises
    ------
    UserError
    """
    roles = [role for role, (_, base) in ROLES.items() if issubclass(part, base)]
    where = f"policy '{text}': class {part.__name__}"
    if len(roles) != 1:
        found = f"is {len(roles)} of" if roles else "is none of"
        raise UserError(f"{where} {found} {_BASES}; allowed: a subclass of one of them")
    if inspect.isabstract(part):
        missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
        raise UserError(f"{where} does not define {missing}")
    # A subclass of a dataclass is one too, by inheritance, but its own fields would be none.
    settings = vars(part).get("__dataclass_params__")
    if not is_dataclass(part) or settings is None or not settings.frozen:
        raise UserError(f"{where} is no frozen dataclass; allowed: @dataclass(frozen=True) above the class")
    for item in fields(part):
        if item.name in _RESERVED:
            raise UserError(
                f"{where}: '{item.name}' cannot be a parameter; allowed: {item.name}: ClassVar[str], "
                "or another name"
            )
        # Without a default of its own, a field takes the base class' property of that name for one.
        if item.default is MISSING or isinstance(item.default, property):
            raise UserError(f"{where}: parameter '{item.name}' has no default; allowed: {item.name} = value")
        if type(item.default) not in _PARAMETER_TYPES:
            raise UserError(
                f"{where}: parameter '{item.name}' is a {type(item.default).__name__}; allowed: "
                "bool, int, float, str"
            )
    name = getattr(part, "name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} has no name; allowed: name: ClassVar[str] = "my-name"')
    return roles[0]


def _source(part: type) -> str | None:
    file = getattr(sys.modules.get(part.__module__), "__file__", None)
    if file is None:
        return None
    return f"{Path(file).name} {_digest(part.__module__, file)}"


@cache
def _digest(module: str, file: str) -> str:
    # What was run, not what the file holds by now.
    content = _LOADED.get(module)
    return _hash(Path(file).read_bytes() if content is None else content)


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    try:
        return f"{path.name} {_hash(path.read_bytes())}"
    except OSError:
        return f"{path.name} unreadable"  # whoever needs it says so


def _told(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(message.split())}".rstrip(": ")
