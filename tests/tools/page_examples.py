"""The pages of the repository, and what stands in them: examples, commands, links, headings."""

import re
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from places import ROOT
from typer.main import get_command

from validate.cli.main import app

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "node_modules", "runs"} & set(path.relative_to(ROOT).parts)
)
_FENCE = re.compile(r"(?:<!-- not run: ([^>]*) -->\n+)?^( *)```(\w*)\n(.*?)^\2```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Example:
    """A fenced block of a page.

    Attributes
    ----------
    page : Path
    language : str
    text : str
        Without its indentation.
    excuse : str
        Why nothing runs it, from the comment before it.
    """

    page: Path
    language: str
    text: str
    excuse: str

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"[:90]


@dataclass(frozen=True)
class Typed:
    """A command that a page shows, as words, and what it prints there, as lines."""

    page: Path
    words: tuple[str, ...]
    excuse: str = ""
    printed: list[str] = field(default_factory=list)

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}: {' '.join(self.words)}"[:90]


def examples(page):
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [Example(page, language, textwrap.dedent(text), excuse) for excuse, _, language, text in found]


def typed(example):
    """Give the commands of a console's example with what each prints."""
    if example.language not in ("console", "sh"):
        return []
    found = []
    for line in example.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ ") or example.language == "sh":
            words = shlex.split(line.removeprefix("$ "), comments=True)
            found.append(Typed(example.page, tuple(words), example.excuse))
        elif found:
            found[-1].printed.append(line)
    return found


def inline(page):
    """Give what stands between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page):
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page):
    """Give the names by which headings can be linked, as code hosts make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


EXAMPLES = [example for page in PAGES for example in examples(page)]
TYPED = [command for example in EXAMPLES for command in typed(example)]


def verbs(command=None, path=()):
    """Give the words and the command of every verb, and of those below them."""
    for name, inner in (command or get_command(app)).commands.items():
        yield " ".join((*path, name)), inner
        if hasattr(inner, "commands"):
            yield from verbs(inner, (*path, name))


VERBS = dict(verbs())
