"""GGUF files, as llama.cpp uses them, converted once into a folder that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from traces.errors import UserError
from traces.extras import require_extra
from traces.lock import locked
from validate.models.pretrained import models_folder

SUFFIX = ".gguf"
ORIGIN_NAME = "origin.json"
_MAGIC = b"GGUF"


def converted(path: Path) -> Path:
    """Give the folder that a GGUF file was converted to, now or before; a changed file is another one.

    Raises
    ------
    UserError
        As `convert_gguf`, and when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"model {path}: cannot be read: {error.strerror}") from None
    # The file's own name, by which traces will know the model.
    folder = models_folder() / "gguf" / digest[:16] / path.stem
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, wait=True):
        if not (folder / "config.json").is_file():
            convert_gguf(path, folder, {"sha256": digest})
    return folder


def convert_gguf(path: Path, folder: Path, origin: Mapping[str, object]) -> None:
    """Write a GGUF model's weights, in float32 so that no quantised number is rounded, and its tokenizer.

    Parameters
    ----------
    path : Path
    folder : Path
        Appears when everything is there.
    origin : mapping
        What ``origin.json`` in the folder says of the file.

    Raises
    ------
    UserError
        When it is no GGUF file, is damaged or cut short, or is of an architecture or a quantisation that
        transformers does not read; when the disk is full.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"model {path}: no GGUF file; allowed: what llama.cpp's tools write")
    require_extra(f"model {path}", "gguf", "accelerate")
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # A bar of the library's own that it cannot be asked to leave out.
        with redirect_stderr(StringIO()):
            _convert(path, temporary)
        (temporary / ORIGIN_NAME).write_text(json.dumps(dict(origin), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    except UserError:
        raise
    except Exception as error:
        # The library's and the reader's own errors are of many types, those of a full disk of two.
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model {path}: cannot be converted: {words[:300]}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from validate.models.whole import load_whole

    file = GGUFReader(path)
    _require_plain_rope(file, path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = load_whole(path.parent, f"model {path}", gguf_file=path.name, dtype=torch.float32)
    # What the library has no place for it leaves out without a word, such as biases of a variant.
    n_stored = sum(int(tensor.n_elements) for tensor in file.tensors)
    n_taken = sum(parameter.numel() for parameter in model.parameters())
    if n_stored != n_taken:
        raise UserError(
            f"model {path}: {n_stored} weights found; transformers takes {n_taken} of such a model"
        )
    # What is saved is not quantised any more.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_plain_rope(file: Any, path: Path) -> None:
    """Refuse scaled RoPE: of most architectures transformers does not read it, and would not scale."""
    kinds = [field for name, field in file.fields.items() if name.endswith(".rope.scaling.type")]
    factors = [tensor.name for tensor in file.tensors if tensor.name.startswith("rope_f")]
    scaled = [field.contents() for field in kinds if field.contents() != "none"] + factors
    if scaled and "gpt-oss" not in str(file.fields["general.architecture"].contents()):
        raise UserError(
            f"model {path}: scaled RoPE found ({scaled[0]}), which transformers does not read from GGUF; "
            "allowed: the model's original checkpoint"
        )
