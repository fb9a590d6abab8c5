"""Which model a protocol runs, and which of its file's models that stands for."""

from __future__ import annotations

import pytest
from spies import NAME

from validate.models.load import know_model, load_model
from validate.protocol.file import read_protocol
from validate.protocol.options import choose_model


@pytest.mark.parametrize(
    ("asked", "load", "label", "stands_for"),
    [
        (None, "{model}", "small", "small"),
        ("small", "{model}", "small", "small"),
        ("other", "org/other", "other", "other"),
        ("org/other", "org/other", "other", "other"),
        ("/data/other/", "/data/other/", "other", "other"),
        ("other=/data/x", "/data/x", "other", "other"),
        ("third=/data/x", "third=/data/x", "third=/data/x", None),
        ("org/third", "org/third", "org/third", None),
        ("random:tiny", "random:tiny", "random:tiny", None),
        ("random:small", "random:small", "random:small", "small"),
    ],
)
def test_a_model_stands_for_one_of_the_file(config, saved, asked, load, label, stands_for):
    found = choose_model(read_protocol(config()), asked)
    assert (found.load, found.label, found.stands_for) == (
        load.format(model=saved / NAME),
        label,
        stands_for,
    )


def test_folders_have_names_that_file_systems_take(config):
    assert choose_model(read_protocol(config()), "org/third").folder == "org-third"
    assert choose_model(read_protocol(config()), "random:tiny").folder == "random-tiny"


@pytest.mark.parametrize("name", ["{folder}", "reference", "random:tiny"])
def test_a_model_is_known_by_the_name_that_loading_gives_it(saved, name):
    name = name.format(folder=saved / NAME)
    known, loaded = know_model(name), load_model(name, "float32", "cpu")
    assert (known.name, known.revision) == (loaded.name, loaded.revision)
    assert known.config.num_hidden_layers == loaded.model.config.num_hidden_layers
