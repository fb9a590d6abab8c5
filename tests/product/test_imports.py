"""Neither package may load a model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOAD_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        importlib.import_module(module.name)
print(len(sys.modules), *sorted({"torch", "transformers"} & set(sys.modules)))
"""


def forbidden_after_loading(*packages, search=()):
    command = [sys.executable, "-c", "import sys; sys.path[:0] = " + repr(list(search)) + LOAD_ALL, *packages]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(printed[0]) > 10
    return printed[1:]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["traces", "simulator"])
def test_package_loads_no_model_library(package):
    assert forbidden_after_loading(package) == []


def test_the_check_can_fail(tmp_path):
    (tmp_path / "torch.py").write_text("")
    offender = tmp_path / "offender"
    offender.mkdir()
    (offender / "__init__.py").write_text("")
    (offender / "deep.py").write_text("import torch\n")
    assert forbidden_after_loading("offender", search=[str(tmp_path)]) == ["torch"]
