"""No file and no function is larger than a reader takes in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("traces", "simulator", "validate", "tests")
MOST_LINES, MOST_BODY_LINES = 400, 60


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function from its first statement to its last, its docstring left out."""
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def too_large(source: str) -> Iterator[str]:
    n_lines = len(source.splitlines())
    if n_lines > MOST_LINES:
        yield f"{n_lines} lines; allowed: {MOST_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MOST_BODY_LINES:
            yield f"{node.name} has {body_lines(node)} lines; allowed: {MOST_BODY_LINES}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_small(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = [
        f"{path.relative_to(ROOT)}: {told}"
        for path in paths
        for told in too_large(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n" * 400, []),
        ("x = 1\n" * 401, ["401 lines; allowed: 400"]),
        ('def f():\n    """Two\n    lines."""\n' + "    x = 1\n" * 60, []),
        ("def f():\n" + "    x = 1\n" * 61, ["f has 61 lines; allowed: 60"]),
        ("class C:\n    async def f():\n" + "        x = 1\n" * 61, ["f has 61 lines; allowed: 60"]),
        ("def f():\n    return g(\n" + "        1,\n" * 59 + "    )\n", ["f has 61 lines; allowed: 60"]),
        ('def f():\n    """Nothing else."""\n', []),
    ],
)
def test_what_is_too_large_is_found(source, expected):
    assert list(too_large(source)) == expected
