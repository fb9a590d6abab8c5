"""A protocol of a tiny model, and its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from spies import NAME, tiny_waves
from tiny_models import tiny_model
from verb_runs import PROBLEMS

from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

CONFIG = """
source = "a paper, table 2"
model = "small"
policies = ["fullkv", "rkv", "reasonalloc"]

[parameters]
buffer = 4

[decoding]
temperature = 1.5
samples = 2

[models.small]
id = "{model}"
wave = "{wave}"

[models.other]
id = "org/other"

[benchmarks.first]
prompts = "{problems}"
max_new_tokens = 8
budgets = [20, 30]

[benchmarks.second]
prompts = "{problems}"
max_new_tokens = 6
budgets = [20]
batch = 2

[[published]]
model = "small"
benchmark = "first"
budget = "full"
accuracy = {{ fullkv = 90 }}

[[published]]
model = "small"
benchmark = "first"
budget = 20
accuracy = {{ rkv = 40.25, reasonalloc = 50 }}
note = "the model is not stated"

[[published]]
model = "other"
benchmark = "second"
budget = 20
accuracy = {{ rkv = 77.77 }}
"""


def write_folder(folder):
    """Write a tiny model, its wave and problems."""
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=2).save_pretrained(folder / NAME)
    build_tokenizer().save_pretrained(folder / NAME)
    replace(tiny_waves()[NAME], model_revision="").write(folder / "wave.json")
    rows = [{name: asdict(own)[name] for name in ("id", "family", "prompt", "answer")} for own in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def decoded(tmp_path):
    """List the batches of a run."""
    return sorted(path.name for path in (tmp_path / "run").rglob("batches/*.parquet"))
