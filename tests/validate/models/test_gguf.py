"""A GGUF file is a model like any other, or one line."""

import json
import subprocess
import sys

import pytest
import torch
from gguf_files import make_gguf
from safetensors.torch import load_file, save_file

from traces.errors import UserError
from validate.models.load import know_model, load_model

IDS = torch.tensor([[1, 40, 41, 42, 3, 200, 17]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.parametrize(("kind", "tied"), [("F32", True), ("F32", False), ("Q8_0", True), ("Q4_1", False)])
def test_it_computes_what_the_file_holds(kind, tied, tmp_path):
    made = make_gguf(tmp_path / "mine.gguf", kind, tied=tied)
    loaded = load_model(str(tmp_path / "mine.gguf"), device="cpu")
    with torch.inference_mode():
        assert torch.equal(loaded.model(IDS).logits, made(IDS).logits)
    assert (loaded.name, loaded.model.dtype) == ("mine", torch.float32)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a cat, 12")) == "a cat, 12"
    assert "<|im_start|>user\nhi" in loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert "quantization_config" not in know_model(str(tmp_path / "mine.gguf")).config.to_dict()


@pytest.mark.slow
def test_it_is_converted_once_and_a_changed_file_anew(tmp_path, cache):
    path = tmp_path / "mine.gguf"
    make_gguf(path)
    first = load_model(str(path), device="cpu")
    (folder,) = cache.glob("gguf/*/mine")
    (folder / "model.safetensors").touch()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_model(str(path), device="cpu").revision == first.revision
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    make_gguf(path, seed=1)
    assert load_model(str(path), device="cpu").revision != first.revision
    assert json.loads((folder / "origin.json").read_text())["sha256"].startswith(folder.parent.name)


def refused(path):
    with pytest.raises(UserError) as error:
        load_model(str(path), device="cpu")
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize("share", [0.5, 0.02, 0.99])
def test_a_file_cut_short_is_one_line(share, tmp_path, cache):
    path = tmp_path / "cut.gguf"
    make_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in refused(path)
    assert not list(cache.glob("gguf/*/cut*"))


def test_what_is_none_is_one_line(tmp_path):
    (tmp_path / "text.gguf").write_text("weights")
    assert "no GGUF file" in refused(tmp_path / "text.gguf")
    assert "No such file" in refused(tmp_path / "missing.gguf")
    make_gguf(tmp_path / "other.gguf", architecture="no-such-thing")
    assert "no-such-thing" in refused(tmp_path / "other.gguf")
    make_gguf(tmp_path / "mute.gguf", tokenizer=False)
    assert str(tmp_path / "mute.gguf") in refused(tmp_path / "mute.gguf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"without": ["blk.1.ffn_up.weight"]}, "1 weights are missing"),
        ({"extra": ["blk.0.attn_q.bias"]}, "weights found; transformers takes"),
        ({"extra": ["rope_freqs.weight"]}, "scaled RoPE found (rope_freqs.weight)"),
        ({"scaled": True}, "scaled RoPE found (yarn)"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(options, said, tmp_path):
    make_gguf(tmp_path / "mine.gguf", **options)
    assert said in refused(tmp_path / "mine.gguf")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path, cache):
    make_gguf(tmp_path / "mine.gguf")
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from validate.models.gguf import converted; from pathlib import Path\n"
        "from traces.errors import UserError\n"
        "try: converted(Path('mine.gguf'))\nexcept UserError as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "mine.gguf: cannot be converted" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1
    assert not list(cache.glob("gguf/*/*mine*"))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    make_gguf(tmp_path / "mine.gguf").save_pretrained(tmp_path / "folder")
    assert "cannot be loaded" in refused(tmp_path / "folder")


def test_a_folder_without_some_weights_is_one_line(tmp_path, cache):
    make_gguf(tmp_path / "mine.gguf")
    load_model(str(tmp_path / "mine.gguf"), device="cpu")
    (folder,) = cache.glob("gguf/*/mine")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing" in refused(folder)
