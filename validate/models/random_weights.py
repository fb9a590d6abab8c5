"""Build a model of a real shape with random weights on its device, and a tokenizer without files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from traces.errors import NoDeviceError, UserError
from validate.models.load import DTYPES, LoadedModel, launch_on, resolve_device
from validate.models.shapes import PREFIX, SPECIAL_TOKENS, find_shape, random_revision


def random_model(
    shape_name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    n_layers: int | None = None,
) -> LoadedModel:
    """Build a model with random weights; at no time is more allocated than the model itself takes.

    Weights are normal with the configuration's own spread, norms 1 and biases 0. A seed gives the same
    weights on devices of one kind only.

    Parameters
    ----------
    shape_name : str
        A name of ``random_shapes.SHAPES``.
    dtype, device : str
        As `load_model`; ``auto`` is the type the source's weights are stored in.
    seed : int
        Of the weights.
    n_layers : int, optional
        Another number of layers, to fit a smaller device; the model's name tells.

    Raises
    ------
    UserError
        For an unknown shape or dtype, or fewer than one layer.
    NoDeviceError
        When the device is not available or too small.
    """
    shape = find_shape(shape_name)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; allowed: auto, {', '.join(DTYPES)}")
    if n_layers is not None and n_layers < 1:
        raise UserError(f"n_layers is {n_layers}; allowed: 1 or more")
    target, stored = resolve_device(device), DTYPES[shape.dtype if dtype == "auto" else dtype]
    layers = {} if n_layers is None else {"num_hidden_layers": n_layers}
    config = AutoConfig.for_model(shape.kind, **(shape.settings | layers), dtype=stored)
    name = PREFIX + shape_name + ("" if n_layers is None else f":{n_layers}-layers")
    launch_on(target)
    with _told_if_too_small(name, target):
        with target:
            model = AutoModelForCausalLM.from_config(config, dtype=stored)
        _fill(model, config.initializer_range, torch.Generator(target).manual_seed(seed))
    return LoadedModel(model.eval(), byte_tokenizer(), name, random_revision(seed))


@torch.no_grad()
def _fill(model: PreTrainedModel, spread: float, generator: torch.Generator) -> None:
    """Draw all weights in place, so that they depend on the seed and on nothing that ran before."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, spread, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@contextmanager
def _told_if_too_small(name: str, target: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # On a CPU it is a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise NoDeviceError(
            f"model '{name}' does not fit into the memory of device '{target}'; "
            "allowed: a smaller shape or dtype, or another device"
        ) from None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the 256 bytes and three special tokens, whose ids fit any vocabulary.

    Text becomes its UTF-8 bytes, one token each. Ids beyond them, which a model may well write, decode to
    nothing.
    """
    alphabet = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def _byte_characters() -> list[str]:
    """Give the character that stands for each byte in a byte-level vocabulary: itself if it can be seen."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
