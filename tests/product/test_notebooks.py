"""Every notebook runs top to bottom, soon enough, and says what it was saved with."""

import ast
import importlib.util
import json
import re
import resource

import nbformat
import pytest
from places import ROOT

HOME = ROOT / "notebooks"
PATHS = sorted(HOME.glob("*.ipynb"))
LIMIT_BYTES, LIMIT_SECONDS = 300_000, 60
LIMIT_CELL_LINES, LIMIT_FUNCTION_LINES = 20, 8


def load_execute():
    spec = importlib.util.spec_from_file_location("execute", HOME / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds_of_children():
    """Give the processor's time that kernels took: what else the machine does is none of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    return [(output.output_type, sorted(output.get("data", {}))) for output in cell.outputs]


def words_and_numbers(cell):
    """Give what a cell says: its words, and its numbers apart from them."""
    text = " ".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.outputs
    )
    numbers = re.findall(r"(?<![\w.#=])[-+]?\d[\d,]*(?:\.\d+)?", text)
    words = re.findall(r"[A-Za-z_][\w.:=+-]*", text)
    return words, [float(number.replace(",", "")) for number in numbers]


def test_there_are_five():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04", "05"]
    listed = (HOME / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in listed for path in PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_saved_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LIMIT_BYTES
    saved = json.loads(text)
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert saved["metadata"]["language_info"] == {"name": "python"}
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)
    assert notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not any("vnd.vegalite" in kind for output in outputs for kind in output.get("data", {}))
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    # No place of the machine that ran it.
    assert not re.search(r"/(home|root|tmp|work|Users|var)/", text)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_logic_lives_in_the_packages(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert len(cell.source.splitlines()) <= LIMIT_CELL_LINES
        if cell.source.startswith("%%writefile"):
            continue
        plain = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LIMIT_FUNCTION_LINES


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_and_says_what_it_was_saved_with(path, tmp_path):
    started = seconds_of_children()
    found = load_execute().executed(path, tmp_path)
    assert seconds_of_children() - started < LIMIT_SECONDS
    assert list(tmp_path.iterdir()) == []
    saved = nbformat.read(path, as_version=4)
    for now, before in zip(code_cells(found), code_cells(saved), strict=True):
        assert kinds(now) == kinds(before), now.id
        (words, numbers), (own_words, own_numbers) = words_and_numbers(now), words_and_numbers(before)
        assert words == own_words, now.id
        # Another processor may add in another order and settle a near-tie otherwise.
        assert numbers == pytest.approx(own_numbers, rel=0.02, abs=0.01), now.id


def test_a_changed_number_is_noticed():
    def cell(text):
        return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=text)])

    assert words_and_numbers(cell("rkv:alpha=0.1 | 28,416 | -0.25")) == (["rkv:alpha=0.1"], [28416, -0.25])
    assert words_and_numbers(cell("| walk | 0.97 |")) != words_and_numbers(cell("| walk | 0.98 |"))
