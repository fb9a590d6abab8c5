"""Every page is true: its commands can be typed, its links lead somewhere, its tables are the stored ones."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from page_examples import EXAMPLES, PAGES, TYPED, VERBS, Typed, anchors, inline, links
from places import ROOT
from typer.main import get_command

from simulator.budget import parse_budgets
from simulator.cli.completion import metrics, policies
from simulator.policies.language import parse_policies
from simulator.policies.shipped import ALIASES, HEAD_ALLOCATORS, LAYER_ALLOCATORS, SCORERS, TRIGGERS
from simulator.results.metric_names import asked_metric
from validate.cli.main import app

README = ROOT / "README.md"


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


# Named in the text with a value, not only by name.
NAMED = [
    Typed(page, tuple(shlex.split(shown)))
    for page in PAGES
    for shown in inline(page)
    if shown.startswith("sim ") and " --" in shown and "|" not in shown and not re.search(r"--[\w-]+$", shown)
]
COMMANDS = [command for command in TYPED + NAMED if command.words[0] == "sim"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_of_a_page_can_be_typed(command):
    words = command.words[1:]
    values = parsed(words[: words.index(">")] if ">" in words else words)
    # A user's own policy is read where its file is made.
    for text in several(values.get("policy")):
        if ".py:" not in text:
            parse_policies([text])
    for text in several(values.get("budget")):
        parse_budgets([str(text)])
    for metric in several(values.get("metric")):
        asked_metric(metric)
    if values.get("config"):
        assert (ROOT / values["config"]).is_file()


TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def exists(word):
    return word.startswith("-") or any(ROOT.glob(word))


CHECKS = {
    "make": lambda words: set(words) <= TARGETS,
    "pip": lambda words: words[:2] == ["install", "-e"] and set(words[2][2:-1].split(",")) <= set(EXTRAS),
    "python": lambda words: exists(words[2] if words[:2] == ["-m", "pytest"] else words[0]),
    "jupyter": lambda words: exists(words[1]),
}


@pytest.mark.parametrize(
    "command", [each for each in TYPED if each.words[0] != "sim"], ids=lambda each: each.name
)
def test_what_else_a_page_types_is_there(command):
    name, *words = command.words
    assert command.excuse or CHECKS[name.rpartition("/")[2]](words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    for shown in inline(page):
        if shown.startswith("make "):
            assert shown.removeprefix("make ") in TARGETS
        elif re.fullmatch(r"(tests|simulator|validate|traces|notebooks)/[\w/.*-]*", shown):
            assert any(ROOT.glob(shown.rstrip("/"))), shown
        elif re.match(r"python \S+\.py", shown):
            assert (ROOT / shown.split()[1]).is_file(), shown
        elif found := re.search(r"\.\[([\w,]+)\]", shown):
            assert set(found[1].split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_what_the_stored_tables_say(page):
    from validate.pages.write import PAGES as MADE
    from validate.pages.write import made

    text = page.read_text(encoding="utf-8")
    assert made(text) == text
    assert ("<!-- table: " in text) == (str(page.relative_to(ROOT)) in MADE)
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_examples_are_of_known_languages():
    assert {example.language for example in EXAMPLES} == {"console", "sh", "python", "toml"}
    assert len(COMMANDS) > 50


def test_the_first_page_is_short_and_begins_with_an_answer():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 12_000
    first_screen = "\n".join(text.splitlines()[:40])
    for words in ("?*", "$ sim replay", "rkv  ", "make demo", "make test"):
        assert words in first_screen


def test_every_policy_has_a_row_with_its_file_and_its_paper():
    page = ROOT / "simulator" / "policies" / "README.md"
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = []
    for role in (SCORERS, LAYER_ALLOCATORS, HEAD_ALLOCATORS, TRIGGERS):
        for name, part in role.items():
            place = "/".join(part.__module__.split(".")[2:]) + ".py"
            papers = re.findall(r"\d{4}\.\d{5}", getattr(part, "source", ""))
            (row,) = [row for row in rows if row.startswith(f"| `{name}` |") and f"({place})" in row]
            assert all(f"arxiv.org/abs/{paper}" in row for paper in papers), name
            expected.append(row)
    expected += [f"| `{name}` | `{meaning}` |" for name, meaning in ALIASES.items()]
    assert sorted(rows) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", VERBS)
def test_an_example_of_help_can_be_typed(path):
    typed = shlex.split(VERBS[path].epilog)
    assert typed[: 1 + len(path.split())] == ["sim", *path.split()]
    parsed(typed[1:])


@pytest.mark.slow
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


@pytest.mark.slow
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
