"""Loading models by name and path, and what their configurations say."""

import json

import pytest
import torch
from tiny_models import ROPES, tiny_model
from transformers import AutoConfig

import validate.models.load
from traces.errors import NoDeviceError, UserError
from traces.shape import ModelShape
from validate.models.load import (
    REFERENCE_NAME,
    find_folder,
    load_model,
    model_shape,
    resolve_device,
    rope_parameters,
    stop_token_ids,
    weights_digest,
)
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(dtype="bfloat16", vocab_size=VOCABULARY_SIZE).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_saved_model_is_loaded_as_it_was_saved(saved):
    loaded = load_model(str(saved), device="cpu")
    assert loaded.name == "tiny-llama"
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.tokenizer("walk so").input_ids == build_tokenizer()("walk so").input_ids
    assert loaded.revision == weights_digest(saved)
    assert len(loaded.revision) == 12


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_can_be_chosen(saved, dtype):
    assert load_model(str(saved), dtype=dtype, device="cpu").model.dtype == getattr(torch, dtype)


def test_revision_follows_the_weights(saved, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == ""
    weights = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert weights_digest(tmp_path) == weights_digest(saved)
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + b"x")
    assert weights_digest(tmp_path) != weights_digest(saved)


def test_reference_is_the_packaged_folder(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(validate.models.load, "REFERENCE_FOLDER", saved)
    assert load_model("reference", device="cpu").name == REFERENCE_NAME
    monkeypatch.setattr(validate.models.load, "REFERENCE_FOLDER", tmp_path)
    with pytest.raises(UserError, match="'reference' is not installed"):
        load_model("reference", device="cpu")


@pytest.mark.parametrize("name", ["./typo", "/no/such/folder", "~/no/such", "a/b/c", "here/typo", ""])
def test_a_mistyped_path_is_not_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=r"is not a folder here|holds no config\.json"):
        load_model(name, device="cpu")


def test_a_hub_id_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("org/name-1.5B") is None
    assert find_folder("gpt2") is None


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model 'no-such-org/no-such-model' cannot be loaded") as caught:
        load_model("no-such-org/no-such-model", device="cpu")
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path), device="cpu")


def test_damaged_weights_are_one_line(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_unknown_dtype_and_device_are_refused(saved):
    with pytest.raises(UserError, match="dtype is 'int8'; allowed: auto, float32, float16, bfloat16"):
        load_model(str(saved), dtype="int8")
    with pytest.raises(UserError, match="device is 'tpu'"):
        load_model(str(saved), device="tpu")


@pytest.mark.parametrize("n_devices", [0, 1])
def test_a_missing_gpu_is_no_device(monkeypatch, n_devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    with pytest.raises(NoDeviceError, match=f"found: {n_devices} CUDA devices") as caught:
        resolve_device(f"cuda:{n_devices}")
    assert caught.value.exit_code == 6
    assert resolve_device("auto").type == ("cuda" if n_devices else "cpu")
    assert resolve_device("cpu").type == "cpu"


def test_shape_comes_from_the_configuration():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3
    )
    config.head_dim = None
    assert model_shape(config, torch.float16) == ModelShape(3, 8, 2, 8, "float16")
    config.num_key_value_heads = None
    config.head_dim = 16
    assert model_shape(config, torch.bfloat16) == ModelShape(3, 8, 8, 16, "bfloat16")
    gpt2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    assert model_shape(gpt2, torch.float32) == ModelShape(2, 4, 4, 8, "float32")
    with pytest.raises(UserError, match="float64"):
        model_shape(gpt2, torch.float64)


@pytest.mark.parametrize("rope", list(ROPES))
def test_rope_parameters_are_plain_json(rope):
    found = rope_parameters(tiny_model(rope=rope).config)
    assert json.loads(json.dumps(found)) == found
    assert found.items() >= ROPES[rope].items()


def test_stop_ids_have_an_order_of_sources():
    model, tokenizer = tiny_model(), build_tokenizer()
    model.generation_config.eos_token_id = [3, 4]
    assert stop_token_ids(model, tokenizer) == (3, 4)
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == (2,)
    model.config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    assert stop_token_ids(model, None) == ()
