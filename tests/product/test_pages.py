"""Every command that a page shows can be typed: its options exist, and its values are read."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from places import ROOT
from typer.main import get_command

from simulator.budget import parse_budgets
from simulator.cli.completion import metrics, policies
from simulator.policies.language import parse_policies
from simulator.results.metric_names import asked_metric
from validate.cli.main import app

PAGES = [path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts)]


def commands_of(text):
    """Give the commands of a page that begin with ``sim``, without prompts, comments and targets."""
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [shown for shown in re.findall(r"`(sim [^`]*)`", text) if "|" not in shown and " --" in shown]
    typed = [line[2:].partition(" > ")[0] for line in lines if line.startswith("$ sim ")] + inline
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


def verbs(command=None, path=()):
    """Give the words and the command of every verb, and of those below them."""
    for name, inner in (command or get_command(app)).commands.items():
        yield " ".join((*path, name)), inner
        if hasattr(inner, "commands"):
            yield from verbs(inner, (*path, name))


VERBS = dict(verbs())


@pytest.mark.parametrize("path", [path for path in VERBS if not path.startswith("trace")])
def test_an_example_of_help_can_be_typed(path):
    typed = shlex.split(VERBS[path].epilog)
    assert typed[: 1 + len(path.split())] == ["sim", *path.split()]
    parsed(typed[1:])


@pytest.mark.parametrize("path", ["", *VERBS])
def test_help_is_whole_at_80_columns(path, run_sim, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_sim(*path.split(), "--help")
    assert code == 0
    lines, _, example = out.partition("\nExample:\n")
    assert max(map(len, lines.splitlines())) <= 80
    commands = lines.partition("\nCommands:\n")[2]
    assert "..." not in commands
    assert example.count("\n") <= 1


def test_many_options_are_shown_in_groups(run_sim):
    _, out, _ = run_sim("validate", "live", "--help")
    names = ("What is run", "Model", "Decoding", "Output", "Options")
    places = [out.index(f"\n{name}:\n") for name in names]
    assert places == sorted(places)
    assert places[1] < out.index(" --device ") < places[2] < out.index(" --top-p ") < places[3]


def test_policies_and_metrics_are_completed():
    assert policies("rkv+utility,stream") == ["rkv+utility,streamingllm"]
    assert policies("rkv+wa") == ["rkv+wave", "rkv+wave-dynamic"]
    assert policies("reason") == ["reasonalloc"]
    assert metrics("gap,mass_m") == ["gap,mass_mean", "gap,mass_min_head"]


def test_a_shell_completes():
    words = {"COMP_WORDS": "sim replay --policy rea", "COMP_CWORD": "3", "_SIM_COMPLETE": "complete_bash"}
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'sim'; from validate.cli.entry import main; main()",
        ],
        env=os.environ | words,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout.split(), ran.stderr) == (["reasonalloc"], "")


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
