"""A saved tiny model beside its problems, for all that decode live."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from live_runs import PROBLEMS, Calls
from spies import NAME
from tiny_models import tiny_model

from validate.models.load import load_model
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved tiny model beside its problems."""
    folder = tmp_path_factory.mktemp("live")
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=2).save_pretrained(folder / NAME)
    build_tokenizer().save_pretrained(folder / NAME)
    rows = [{name: asdict(own)[name] for name in ("id", "family", "prompt", "answer")} for own in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def loaded(folder):
    return load_model(str(folder / NAME), "float32", "cpu")


@pytest.fixture
def calls(monkeypatch):
    """Give what takes the place of processes."""
    return lambda asked, **options: Calls(monkeypatch, asked, **options)
