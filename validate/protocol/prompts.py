"""Bring a benchmark's problems, from a file or URL, JSONL or Parquet, into the form in which they are run."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

from simulator.results.store import parse_foreign_parquet
from traces.atomic import write_file, write_text
from traces.documents import shown
from traces.errors import UserError
from traces.extras import require_extra
from traces.remote import is_remote
from validate.problems.prompts import parse_prompts, require_answers
from validate.protocol.file import PROBLEM


def prepare_prompts(name: str, source: str, template: str, folder: Path) -> Path:
    """Write a benchmark's prompts as they are run, one JSON object per line.

    What a URL holds is kept beside them, so that a run goes on without a network.

    Parameters
    ----------
    name : str
        The benchmark's; it becomes the family of problems that have none.
    source : str
        File or URL of JSONL or, by its suffix, Parquet.
    template : str
        What is asked, with ``{problem}`` for the problem.
    folder : Path
        Made if it is not there.

    Returns
    -------
    Path
        ``folder/NAME.jsonl``.

    Raises
    ------
    UserError
        If the problems cannot be read, or one has no answer.
    """
    content = _read(name, source, folder)
    if source.endswith(".parquet"):
        try:
            content = parse_foreign_parquet(content).write_ndjson().encode()
        except ValueError as error:
            raise _unreadable(name, source, f"no Parquet: {error}") from None
    problems = parse_prompts(content, source)
    require_answers(problems, source)
    lines = [
        {
            "id": problem.id,
            "family": problem.family or name,
            "prompt": template.replace(PROBLEM, problem.text),
            "answer": problem.answer,
            **({} if problem.system is None else {"system": problem.system}),
        }
        for problem in problems
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    place = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(place, text)
    return place


def _read(name: str, source: str, folder: Path) -> bytes:
    if not is_remote(source):
        try:
            return Path(source).expanduser().read_bytes()
        except (OSError, ValueError) as error:  # a NUL character
            raise _unreadable(name, shown(source), getattr(error, "strerror", None) or str(error)) from None
    kept = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}.source"
    if kept.is_file():
        return kept.read_bytes()
    content = _fetch(name, source)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(kept, lambda temporary: temporary.write_bytes(content))
    return content


def _fetch(name: str, url: str) -> bytes:
    require_extra(f"benchmark '{name}' at {url}", "fsspec")
    fsspec = import_module("fsspec")
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:
        # Every file system has errors of its own: no such file, no network, no right to read it.
        reason = " ".join(str(error).split()) or "no reason given"
        raise _unreadable(name, url, f"{type(error).__name__}: {reason[:200]}") from None


def _unreadable(name: str, source: str, reason: str) -> UserError:
    return UserError(
        f"benchmark '{name}': its prompts {source} cannot be read: {reason}; "
        f"allowed: --prompts {name}=FILE.jsonl of problem and answer"
    )
