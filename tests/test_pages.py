"""Every command that a page shows can be typed: its options exist, and its values are read."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from simulator.budget import parse_budgets
from simulator.metric_names import asked_metric
from simulator.policy import parse_policies
from validate.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts)]


def commands_of(text):
    """Give the commands of a page that begin with ``sim``, without prompts, comments and placeholders."""
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [shown for shown in re.findall(r"`(sim [^`]*)`", text) if "|" not in shown and " --" in shown]
    inline = [shown for shown in inline if not shown.endswith("--config")]  # named, not shown
    typed = [line[2:] for line in lines if line.startswith("$ sim ")] + inline
    return [shlex.split(line, comments=True)[1:] for line in typed]


def parsed(arguments):
    """Parse a command as ``sim`` does, running nothing; give the values of its options."""
    values = {}

    def note(command):
        command.callback = lambda **given: values.update(given)
        for inner in getattr(command, "commands", {}).values():
            note(inner)

    command = get_command(app)
    note(command)
    command.main(list(arguments), "sim", standalone_mode=False)
    return values


def several(value):
    """Give the values of an option that may repeat, without placeholders."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if each not in (None, "...")]


COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {' '.join(command)}"[:90])
    for page in PAGES
    for command in commands_of(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_can_be_typed(command):
    values = parsed(command)
    # The README's own policy is read where its file is made.
    for text in several(values.get("policy")):
        if ".py:" not in text:
            parse_policies([text])
    for text in several(values.get("budget")):
        parse_budgets([str(text)])
    for metric in several(values.get("metric")):
        asked_metric(metric)
    if values.get("config"):
        assert (ROOT / values["config"]).is_file()


def test_commands_are_found_in_the_pages():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("replay --trace sample --polcy rkv", "No such option"),
        ("reply", "No such command"),
        ("results", "Missing"),
        ("validate bnch", "No such command"),
        ("replay --trace sample --jobs many", "valid integer"),
    ],
)
def test_what_cannot_be_typed_is_noticed(command, words):
    with pytest.raises(Exception, match=words):
        parsed(command.split())
