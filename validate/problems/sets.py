"""Prompts that ship with the package, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from traces.errors import UserError
from traces.wording import near

_HOME = Path(str(resources.files("validate.problems") / "sets"))
SETS = tuple(sorted(path.stem for path in _HOME.glob("*.jsonl")))


def prompts_file(asked: Path | str) -> Path:
    """Give the file of a prompts file or of a set by its name, such as ``gsm8k-400``.

    Raises
    ------
    UserError
        If it is neither.
    """
    path = Path(asked)
    if str(asked) in SETS and not path.exists():
        return _HOME / f"{asked}.jsonl"
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    raise UserError(
        f"--prompts is '{asked}'{near(str(asked), SETS)}; allowed: a JSONL file, {', '.join(SETS)}"
    )
