"""A base install, without torch or any other extra: one line names what is missing and how to get it."""

import subprocess
import sys

import pytest

from traces.errors import UserError
from traces.extras import EXTRAS, require_extra

SCRIPT = """
import sys

class Hidden:
    # As if none of these had ever been installed.
    names = set(sys.argv.pop(1).split(","))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Hidden())
from validate.cli.entry import main
sys.argv[0] = "sim"
main()
"""


def run_without(packages, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(packages), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


@pytest.fixture
def files(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "walk", "answer": "leg", "family": "math"}\n')
    (tmp_path / "s.toml").write_text(
        'traces = ["sample"]\npolicies = ["rkv"]\nbudgets = ["20%"]\nout = "o"\n'
    )
    (tmp_path / "c.json").write_text('[{"policy": "rkv", "budget": 64}]')
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("torch", "record --prompts p.jsonl --out out"),
        ("torch", "record --prompts p.jsonl --out out --random-weights tiny"),
        ("torch", "validate live --prompts p.jsonl --out out"),
        ("torch", "validate live --prompts p.jsonl --out out --configs c.json"),
        ("torch", "validate shadow --trace sample --budget 20%"),
        ("torch", "validate forced --trace sample --budget 20%"),
        ("torch", "validate protocol --config s.toml --out out"),
        ("torch", "validate bench"),
        ("transformers", "record --prompts p.jsonl --out out"),
        ("transformers", "validate shadow --trace sample --budget 20%"),
        ("altair", "report --trace sample --out page.html"),
        ("vl_convert", "report --trace sample --out page.html"),
        ("altair", "validate live --prompts p.jsonl --out out --report page.html"),
        ("jinja2", "report --trace sample --out page.html"),
        ("jinja2", "validate live --prompts p.jsonl --out out --report page.html"),
        ("optuna", "search --trace sample --held-out sample --budget 20% --out out"),
        ("fsspec", "replay --trace s3://bucket/traces"),
        ("distributed", "sweep s.toml --engine dask://localhost:1"),
        ("ray", "sweep s.toml --engine ray"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_command(package, command, files):
    ended = run_without([package], *command.split(), cwd=files)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout, len(lines)) == (2, "", 1), ended.stderr
    assert lines[0].startswith("sim: ")
    name = package.replace("_", "-").replace("vl-convert", "vl-convert-python")
    assert f"needs {name}, which is not installed; allowed: pip install 'kvbudget[" in lines[0]
    assert not (files / "out").exists()


@pytest.mark.slow
def test_everything_else_works_without_any_extra(files):
    for command in ("replay --trace sample --buffer 32 -p rkv -b 20% -o rows.csv", "results rows.csv"):
        ended = run_without(EXTRAS, *command.split(), cwd=files)
        assert ended.returncode == 0, ended.stderr


def test_a_user_who_has_the_package_is_let_through(monkeypatch):
    require_extra("counting", "json")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"counting needs optuna, which .* pip install 'kvbudget\[search\]'"):
        require_extra("counting", "json", "optuna")
