"""Pretrained language models by short name: what they are and where their packages lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from traces.cache import cache_folder
from traces.documents import read_toml

_TABLE = Path(__file__).with_name("pretrained.toml")


class Pretrained(msgspec.Struct, frozen=True):
    """A model that packages of the Python Package Index carry as a GGUF file.

    Attributes
    ----------
    model, quantisation, licence, origin : str
        Its full name, the GGUF's kind of numbers, the licence of the weights, and who published them.
    packages : list of str
        ``NAME==VERSION``; the file's parts in order.
    member : str
        Path or glob of the one file that is read of each package.
    bytes : int
    sha256 : str
        Of the whole GGUF file.
    """

    model: str
    quantisation: str
    licence: str
    origin: str
    packages: list[str]
    member: str
    bytes: int
    sha256: str


@cache
def pretrained_models() -> dict[str, Pretrained]:
    """Give all models that are known by a short name."""
    return read_toml(_TABLE, _TABLE.name, dict[str, Pretrained])


def models_folder() -> Path:
    """Give the folder of converted models, one folder each by its short name."""
    return cache_folder("models")


def is_here(name: str) -> bool:
    """Tell whether a model has been brought and converted; its folder appears last of all."""
    return (models_folder() / name / "config.json").is_file()
