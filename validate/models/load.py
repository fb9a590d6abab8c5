"""Load a causal language model, and read from its configuration what a trace states."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from traces.errors import NoDeviceError, UserError
from traces.manifest import MANIFEST_NAME
from traces.shape import ModelShape
from validate.models import gguf
from validate.models.pretrained import is_here, models_folder, pretrained_models
from validate.models.shapes import PREFIX, find_shape, random_revision
from validate.models.whole import load_whole

REFERENCE = "reference"
REFERENCE_NAME = "kvbudget-reasoner-v2"
REFERENCE_FOLDER = Path(__file__).parents[1] / "reasoner" / "weights"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# RoPE whose frequencies follow the longest position of a forward pass, hence how a text is cut.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class LoadedModel(NamedTuple):
    """A model ready to run, and what a trace says of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str


def load_model(
    name_or_path: str, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name_or_path : str
        ``reference`` for the packaged reasoner, the short name of a pretrained model that has been brought, a
        GGUF file, a folder with a saved model, a hub id, or ``random:SHAPE`` for random weights.
    dtype : str
        ``auto`` for the type the weights are stored in, ``float32``, ``float16`` or ``bfloat16``.
    device : str
        ``auto`` for a GPU if there is one, ``cpu``, ``cuda`` or ``cuda:N``.
    revision : str, optional
        Branch, tag or commit on the hub.

    Raises
    ------
    UserError
        When there is no such model or dtype, or it is no causal language model.
    NoDeviceError
        When the device is not available or too small.
    """
    if name_or_path.startswith(PREFIX):
        # It builds on this module.
        from validate.models.random_weights import random_model

        if revision is not None:
            raise UserError(f"revision is '{revision}'; allowed: none for random weights")
        return random_model(name_or_path.removeprefix(PREFIX), dtype=dtype, device=device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; allowed: auto, {', '.join(DTYPES)}")
    target = resolve_device(device)
    folder = find_folder(name_or_path)
    source = name_or_path if folder is None else str(folder)
    options = {} if revision is None else {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        what, stored = f"model '{name_or_path}'", DTYPES.get(dtype, "auto")
        model = load_whole(source, what, config=config, dtype=stored, **options)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_be_loaded(name_or_path, error) from error
    dtype_name(model.dtype)
    placed = _place(model, target, name_or_path)
    return LoadedModel(placed, tokenizer, *_identity(name_or_path, folder, config))


class KnownModel(NamedTuple):
    """What is known of a model before its weights are loaded."""

    config: PreTrainedConfig
    name: str
    revision: str


def know_model(name_or_path: str, revision: str | None = None) -> KnownModel:
    """Read a model's configuration, and the name and revision that `load_model` will give it.

    Raises
    ------
    UserError
        When there is no such model.
    """
    if name_or_path.startswith(PREFIX):
        shape = find_shape(name_or_path.removeprefix(PREFIX))
        config = AutoConfig.for_model(shape.kind, **shape.settings, dtype=DTYPES[shape.dtype])
        return KnownModel(config, name_or_path, random_revision(0))
    folder = find_folder(name_or_path)
    source = name_or_path if folder is None else str(folder)
    try:
        config = AutoConfig.from_pretrained(source, **({} if revision is None else {"revision": revision}))
    except Exception as error:
        raise _cannot_be_loaded(name_or_path, error) from error
    return KnownModel(config, *_identity(name_or_path, folder, config))


def _identity(name_or_path: str, folder: Path | None, config: PreTrainedConfig) -> tuple[str, str]:
    """Give name and revision, as traces and waves state them."""
    if folder is None:
        return name_or_path, getattr(config, "_commit_hash", None) or ""
    name = REFERENCE_NAME if name_or_path == REFERENCE else folder.resolve().name
    return name, weights_digest(folder)


def _cannot_be_loaded(name_or_path: str, error: Exception) -> UserError:
    # Names not found, no network, gated and unknown models, files that are damaged: the library has a type
    # of its own for each.
    reason = " ".join(str(error).split())
    return UserError(f"model '{name_or_path}' cannot be loaded: {reason[:300]}")


def _place(model: PreTrainedModel, target: torch.device, name_or_path: str) -> PreTrainedModel:
    launch_on(target)
    module: torch.nn.Module = model  # transformers' own annotation of `to` fits no argument
    try:
        module.to(target)
        return model.eval()
    except torch.OutOfMemoryError as error:
        raise NoDeviceError(
            f"model '{name_or_path}' does not fit into the memory of device '{target}'; "
            "allowed: a smaller model or dtype, or cpu"
        ) from error


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists.

    Raises
    ------
    UserError
        For another name.
    NoDeviceError
        When there is no such GPU.
    """
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if n_devices else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UserError(f"device is '{device}'; allowed: auto, cpu, cuda, cuda:N")
    target = torch.device(device)
    if target.type == "cuda" and (target.index or 0) >= n_devices:
        raise NoDeviceError(f"device is '{device}'; found: {n_devices} CUDA devices; allowed: auto, cpu")
    return target


def launch_on(target: torch.device) -> None:
    """Let kernels, graphs and events be those of a model's device, if it is one of several."""
    if target.type == "cuda" and target.index is not None:
        torch.cuda.set_device(target)


def find_folder(name_or_path: str) -> Path | None:
    """Find the local folder that a name stands for; None for one of the hub, or for random weights.

    Raises
    ------
    UserError
        When it can only be a path and holds no model: a typo is not looked up on the network. For a
        pretrained model that is not here yet, and for a GGUF file that cannot be converted.
    """
    if name_or_path == REFERENCE:
        if not (REFERENCE_FOLDER / "config.json").is_file():
            raise UserError(f"model '{REFERENCE}' is not installed: {REFERENCE_FOLDER} holds no config.json")
        return REFERENCE_FOLDER
    if name_or_path.startswith(PREFIX):
        return None
    if name_or_path in pretrained_models():
        if not is_here(name_or_path):
            raise UserError(
                f"model '{name_or_path}' is not here yet; allowed: sim models fetch {name_or_path}"
            )
        return models_folder() / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.suffix.lower() == gguf.SUFFIX and not folder.is_dir():
        return gguf.converted(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "is a trace" if (folder / MANIFEST_NAME).is_file() else "holds no config.json"
            raise UserError(f"model folder {name_or_path} {what}; allowed: a saved model")
        return folder
    # "org/name" is a hub id, unless its first part is a folder here: then the second is a typo.
    is_path = not HUB_NAME.fullmatch(name_or_path) or folder.exists()
    if is_path or ("/" in name_or_path and folder.parent.is_dir()):
        raise UserError(
            f"model '{name_or_path}' is not a folder here; allowed: {REFERENCE}, a name of "
            "sim models list, a GGUF file, a folder with config.json, or a hub id such as org/name"
        )
    return None


def weights_digest(folder: Path) -> str:
    """Give the first 12 digits of the sha256 over a folder's weight files; empty without any."""
    digest, files = hashlib.sha256(), sorted(folder.iterdir())
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    for path in weights:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12] if weights else ""


def dtype_name(dtype: torch.dtype) -> str:
    """Give the name of a type that traces can store.

    Raises
    ------
    UserError
        For another type.
    """
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise UserError(f"the model computes in {dtype}; allowed: {', '.join(DTYPES)}")


def model_shape(config: PreTrainedConfig, dtype: torch.dtype) -> ModelShape:
    """Read layers, heads and head width from a configuration."""
    text = config.get_text_config()
    n_query_heads = text.num_attention_heads
    return ModelShape(
        n_layers=text.num_hidden_layers,
        n_query_heads=n_query_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_query_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // n_query_heads,
        dtype=dtype_name(dtype),
    )


def rope_parameters(config: PreTrainedConfig) -> dict[str, object]:
    """Read the RoPE parameters as plain JSON values; empty for a model without RoPE."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Configurations may hold arrays and types of their own; unknown ones are kept as text.
    return json.loads(json.dumps(dict(parameters), default=str))


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Find the ids that end a text: of generation settings, else configuration, else tokenizer."""
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    for source in sources:
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
