"""A protocol of a tiny model."""

from __future__ import annotations

import pytest
from protocols import CONFIG, write_folder
from spies import NAME


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A saved tiny model, its wave and problems."""
    folder = tmp_path_factory.mktemp("protocol")
    write_folder(folder)
    return folder


@pytest.fixture
def config(saved, tmp_path):
    """Write the protocol, perhaps with one part replaced; give its path."""

    def write(old="", new=""):
        places = {
            "model": saved / NAME,
            "wave": saved / "wave.json",
            "problems": saved / "problems.jsonl",
        }
        text = CONFIG.format(**places)
        assert old in text
        (tmp_path / "protocol.toml").write_text(text.replace(old, new) if old else text)
        return tmp_path / "protocol.toml"

    return write
