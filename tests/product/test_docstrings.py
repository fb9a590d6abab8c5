"""Docstrings name the parameters that there are, in their order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("traces", "simulator", "validate")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(docstring: str, section: str) -> list[str] | None:
    """Give the names that a numpy section lists, or None if there is no such section."""
    found = re.search(rf"^{section}\n-+\n(.*?)(?:\n\n\w[\w ]*\n-+\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    heads = [line.partition(" : ")[0] for line in found[1].splitlines() if line and not line[0].isspace()]
    return [name.strip("* ") for head in heads for name in head.split(",")]


def parameters(function: Function, is_method: bool) -> list[str]:
    """Give the names of a function's parameters in the order of its signature."""
    own = function.args
    plain = [*own.posonlyargs, *own.args][is_method:]
    starred = [each for each in (own.vararg,) if each], [each for each in (own.kwarg,) if each]
    return [each.arg for each in (*plain, *starred[0], *own.kwonlyargs, *starred[1])]


def fields(node: ast.ClassDef) -> list[str] | None:
    """Give the public fields that a class of data adds, or None for another class."""
    words = [ast.unparse(each) for each in (*node.decorator_list, *node.bases)]
    if not any(re.match(r"(dataclass|NamedTuple|Struct)\b", word) for word in words):
        return None
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if not each.target.id.startswith("_") and "ClassVar" not in ast.unparse(each.annotation)
    ]


def compared(node: Function | ast.ClassDef, is_method: bool) -> Iterator[tuple[str, list[str]]]:
    """Give each section that has to agree with the code, and what it has to name."""
    if not isinstance(node, ast.ClassDef):
        yield "Parameters", parameters(node, is_method)
        return
    held = fields(node)
    made = [each for each in node.body if isinstance(each, Function) and each.name == "__init__"]
    if held is not None:
        yield "Parameters", held
        if named(ast.get_docstring(node) or "", "Parameters") is None:
            yield "Attributes", held
    elif made:
        yield "Parameters", parameters(made[0], True)


def differences(source: str) -> Iterator[str]:
    """Tell each function and class whose docstring names other parameters than it has."""
    tree = ast.parse(source)
    methods = {each for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for each in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, Function | ast.ClassDef):
            continue
        is_static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
        for section, expected in compared(node, node in methods and not is_static):
            found = named(ast.get_docstring(node) or "", section)
            if found is not None and found != expected:
                yield f"line {node.lineno}: {section} of {node.name} are {found}; the code has {expected}"


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_name_the_parameters_there_are(package):
    wrong = [
        f"{path.relative_to(ROOT)}, {told}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for told in differences(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


FUNCTION = '''
def f(a, /, b, *c, d=1, **e):
    """Do.

    Parameters
    ----------
    %s

    Returns
    -------
    int : the sum
    """
'''
DATA = '''
@dataclass(frozen=True)
class A(B):
    """Hold.

    Attributes
    ----------
    %s
    """

    name: ClassVar[str] = ""
    x: int
    y: int = 0
    _z: int = 0
'''
MADE = '''
class A:
    """Be.

    Parameters
    ----------
    %s

    Attributes
    ----------
    z : int
    """

    def __init__(self, x, y):
        self.z = x + y
'''
METHOD = '''
class A:
    @staticmethod
    def f(x, y):
        """Do.

        Parameters
        ----------
        x, y : int
        """

    def g(self, x):
        """Do.

        Parameters
        ----------
        %s : int
        """
'''


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (
            FUNCTION,
            "a, b : int\n        With words.\n    *c\n    d : int\n    **e",
            "a : int\n    *c, d, **e",
        ),
        (FUNCTION, "a, b, *c, d, **e", "b, a, *c, d, **e"),
        (DATA, "x, y : int", "x : int"),
        (DATA, "x : int\n    y : int", "y : int\n    x : int"),
        (DATA.replace("Attributes", "Parameters"), "x, y : int", "name, x, y : int"),
        (MADE, "x, y : int", "x, y, z : int"),
        (METHOD, "x", "self, x"),
    ],
)
def test_names_that_differ_are_found(source, right, wrong):
    assert list(differences(source % right)) == []
    assert len(list(differences(source % wrong))) == 1


def test_what_names_nothing_is_not_asked():
    docstring = "Do with ``a``.\n\n    Returns\n    -------\n    int\n    "
    assert list(differences(f'def f(a):\n    """{docstring}"""')) == []
