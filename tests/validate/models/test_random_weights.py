"""Models with random weights: real shapes, built in place, and never mistaken for trained ones."""

from __future__ import annotations

import json
import sys

import polars as pl
import pytest
import torch
from spies import InThisProcess
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from traces.check import check_trace
from traces.errors import NoDeviceError, UserError
from traces.store import open_trace
from validate.cli import main as cli
from validate.live import matrix
from validate.models import random_weights
from validate.models.load import find_folder, load_model, model_shape, rope_parameters, stop_token_ids
from validate.models.random_weights import byte_tokenizer, random_model
from validate.models.shapes import SHAPES, asked_model, meaningless
from validate.models.vocabulary import vocabulary_of
from validate.problems.prompts import encode_prompt

TEXT = "naïve → <eos> ½ 12\n  a\x00\x7f"
# As the models' own pages give them.
N_PARAMETERS = {
    "R1-Llama-8B": 8_030_261_248,
    "R1-Qwen-14B": 14_770_033_664,
    "AceReason-14B": 14_770_033_664,
    "tiny": 426_624,
}
KV_SHAPES = {
    "R1-Llama-8B": (32, 32, 8, 128),
    "R1-Qwen-14B": (48, 40, 8, 128),
    "AceReason-14B": (48, 40, 8, 128),
    "tiny": (2, 4, 2, 32),
}


@pytest.fixture
def tiny():
    return random_model("tiny", device="cpu")


def test_every_shape_is_checked_here():
    assert set(N_PARAMETERS) == set(KV_SHAPES) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_size_of_their_source(name):
    config = AutoConfig.for_model(SHAPES[name].kind, **SHAPES[name].settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == N_PARAMETERS[name]
    shape = model_shape(config, torch.bfloat16)
    found = shape.n_layers, shape.n_query_heads, shape.n_kv_heads, shape.head_dim
    assert found == KV_SHAPES[name]
    rope = rope_parameters(config)
    assert {key: rope[key] for key in SHAPES[name].settings["rope_parameters"]} == SHAPES[name].settings[
        "rope_parameters"
    ]


def test_weights_are_normal_norms_one_and_biases_zero():
    model = random_model("tiny", device="cpu", seed=1).model
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert abs(parameter.mean().item()) < 1e-3
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    assert not model.training


def test_biases_of_queries_keys_and_values_are_zero(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 300, "num_attention_heads": 4}
    settings = SHAPES["R1-Qwen-14B"].settings | small | {"num_key_value_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setitem(SHAPES, "small", random_weights.find_shape("tiny").__class__("-", "qwen2", settings))
    model = random_model("small", device="cpu").model
    biases = [own for name, own in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 3
    assert all((own == 0).all() for own in biases)


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before():
    first = random_model("tiny", device="cpu", seed=3).model.lm_head.weight
    torch.rand(7)
    assert torch.equal(random_model("tiny", device="cpu", seed=3).model.lm_head.weight, first)
    assert not torch.equal(random_model("tiny", device="cpu", seed=4).model.lm_head.weight, first)


class LargestByType(TorchDispatchMode):
    """Notes the largest tensor of each type that any operation gives."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor):
            self.found[result.dtype] = max(self.found.get(result.dtype, 0), result.numel())
        return result


def test_weights_are_never_held_in_another_type():
    with LargestByType() as watch:
        model = random_model("tiny", device="cpu", dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert watch.found[torch.bfloat16] == 512 * 128
    assert watch.found.get(torch.float32, 0) <= 32  # frequencies of the rotation


@pytest.mark.parametrize("name", ["R1-Llama-8B", "tiny"])
def test_auto_is_the_type_of_the_source(name, monkeypatch):
    asked = []
    monkeypatch.setattr(random_weights, "_fill", lambda *_: None)
    monkeypatch.setattr(
        random_weights.AutoModelForCausalLM,
        "from_config",
        lambda config, dtype: asked.append((config.dtype, dtype)) or torch.nn.Identity(),
    )
    random_model(name, device="cpu")
    assert asked == [{"R1-Llama-8B": (torch.bfloat16,) * 2, "tiny": (torch.float32,) * 2}[name]]


def test_layers_can_be_left_out_and_the_name_tells():
    loaded = random_model("tiny", device="cpu", n_layers=1, seed=5)
    assert loaded.model.config.num_hidden_layers == len(loaded.model.model.layers) == 1
    assert (loaded.name, loaded.revision) == ("random:tiny:1-layers", "seed-5")


def test_the_tokenizer_writes_bytes(tiny):
    tokenizer = tiny.tokenizer
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    special = TEXT.split("<eos>")
    assert ids == [*special[0].encode(), 258, *special[1].encode()]
    assert encode_prompt(tokenizer, "ab") == [97, 98]
    assert max(ids) < len(tokenizer) == 259 <= tiny.model.config.vocab_size
    assert tokenizer.decode([104, 300, 258, 128255, 105], skip_special_tokens=True) == "hi"
    assert vocabulary_of(tokenizer, [104, 300]) == {104: "h", 300: ""}
    assert stop_token_ids(tiny.model, tokenizer) == (258,)


def test_every_byte_has_a_token_of_its_own():
    tokenizer = byte_tokenizer()
    for code in range(0x110000):
        if code < 0x800 or (code % 4099 == 0 and not 0xD800 <= code < 0xE000):
            assert tokenizer(chr(code)).input_ids == list(chr(code).encode())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shape_name": "R1"}, "'R1' are of no known shape; allowed: R1-Llama-8B, R1-Qwen-14B"),
        ({"dtype": "float8"}, "dtype is 'float8'; allowed: auto, float32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"n_layers": 0}, "n_layers is 0; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_built_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        random_model(**{"shape_name": "tiny", "device": "cpu"} | given)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_device_too_small_is_one_line(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(random_weights.AutoModelForCausalLM, "from_config", fails)
    with pytest.raises(
        NoDeviceError, match=r"\Amodel 'random:tiny' does not fit .* 'cpu'; allowed: [^\n]*\Z"
    ):
        random_model("tiny", device="cpu")


def test_another_failure_is_not_called_a_lack_of_memory(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(random_weights.AutoModelForCausalLM, "from_config", fails)
    with pytest.raises(RuntimeError, match="no kernel image"):
        random_model("tiny", device="cpu")


def test_names_stand_for_random_weights_wherever_models_are_loaded(tiny):
    loaded = load_model("random:tiny", "auto", "cpu")
    assert (loaded.name, loaded.revision) == ("random:tiny", "seed-0")
    assert torch.equal(loaded.model.lm_head.weight, tiny.model.lm_head.weight)
    assert find_folder("random:tiny") is None
    with pytest.raises(UserError, match="revision is 'main'; allowed: none"):
        load_model("random:tiny", "auto", "cpu", "main")
    with pytest.raises(UserError, match="of no known shape"):
        load_model("random:none", "auto", "cpu")


def test_the_line_under_results_is_for_random_weights_only():
    assert asked_model(None, None, "reference") == "reference"
    assert asked_model("org/name", None, "reference") == "org/name"
    assert meaningless(asked_model(None, "tiny", "reference")).startswith("random:tiny: random weights")
    assert meaningless("reference") == ""


# On the command line --------------------------------------------------------------------------------------


@pytest.fixture
def sim(monkeypatch, capsys, tmp_path):
    """Run a verb in this process on two problems; give exit code, standard output and standard error."""
    monkeypatch.setattr(matrix, "processes", InThisProcess)
    monkeypatch.setattr(matrix, "_worker", {})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    rows = [{"id": f"p{i}", "family": "walk", "prompt": f"walk {i}", "answer": "1"} for i in range(2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(verb, *options, weights="tiny"):
        given = ["--prompts", tmp_path / "p.jsonl", "--out", tmp_path / verb, "--device", "cpu"]
        given += [] if weights is None else ["--random-weights", weights]
        arguments = ["sim", *verb.split(), *given, "--max-new-tokens", 12, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


NOTE = "random:tiny: random weights of the shape tiny; its texts and answers mean nothing, time and memory do"


def test_a_live_run_with_random_weights_says_so(sim, tmp_path):
    options = ["-p", "rkv,reasonalloc:buffer=4", "-b", 20, "--buffer", 4]
    code, out, err = sim("validate live", *options, "--report", tmp_path / "r.html")
    assert code == 1  # no wave is known for reasonalloc
    assert out.rstrip().endswith(NOTE)
    assert out.count(NOTE) == 1
    assert "no wave for model 'random:tiny'" in err
    assert json.loads((tmp_path / "validate live" / "settings.json").read_text())["model"] == "random:tiny"
    assert NOTE in (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = tmp_path / "rows.parquet"
    code, out, err = sim("validate live", "-p", "rkv", "-b", 20, "--buffer", 4, "-o", rows)
    assert (code, out, err) == (0, "", f"sim: wrote {rows}: 4 rows\nsim: {NOTE}\n")
    assert len(pl.read_parquet(rows)) == 4


def test_a_recording_with_random_weights_says_so_and_gives_a_wave(sim, run_sim, tmp_path):
    code, out, _ = sim("record")
    assert code == 0
    assert out.splitlines()[-1] == NOTE
    trace = open_trace(tmp_path / "record" / "p0.kvtrace")
    check_trace(trace)
    assert (trace.model, trace.manifest.model_revision) == ("random:tiny", "seed-0")
    wave = tmp_path / "wave.json"
    assert run_sim("calibrate", "--trace", tmp_path / "record", "--out", wave)[0] == 0
    code, out, err = sim("validate live", "-p", "reasonalloc", "-b", 20, "--buffer", 4, "--wave", wave)
    assert (code, err) == (0, "")
    assert "reasonalloc" in out


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate live", "record"])
@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ("tiny", ["--model", "reference"], "--model reference and --random-weights tiny are given; allowed"),
        ("R1", [], "random weights 'R1' are of no known shape; allowed: R1-Llama-8B"),
    ],
)
def test_mistakes_are_one_line(sim, tmp_path, verb, weights, options, words):
    code, out, err = sim(verb, *options, weights=weights)
    assert (code, out) == (2, "")
    assert err.startswith("sim: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / verb).exists()
