"""The reference model's training: its batches, its tokenizer, and that it resumes where it died."""

import json

import pytest
import torch
from transformers import LlamaConfig

from validate.problems.families import CARE, FAMILIES, MAX_LENGTH, MAX_SIZE, MIN_SIZE, make_problem
from validate.reasoner import train as training
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer


def test_tokenizer_knows_every_word_and_reads_back_as_text():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY_SIZE
    for family in FAMILIES:
        for size in range(MIN_SIZE, MAX_SIZE + 1):
            for care in range(len(CARE)):
                problem = make_problem(family, 1, size, size, MAX_LENGTH, care, slip_rate=0.5)
                for text in (problem.prompt, problem.completion):
                    ids = tokenizer(text).input_ids
                    assert ids[0] == tokenizer.bos_token_id
                    assert tokenizer.unk_token_id not in ids
                    assert len(ids) == 1 + len(text.split())
                    assert tokenizer.decode(ids[1:]) == text


def test_the_longest_problem_fits_into_the_model():
    positions = training.reasoner_config(build_tokenizer()).max_position_embeddings
    for family in FAMILIES:
        for index in range(20):
            problem = make_problem(family, 1, index, MAX_SIZE, MAX_LENGTH)
            assert len(problem.prompt.split()) + len(problem.completion.split()) + 2 <= positions


@pytest.fixture
def tiny_training(monkeypatch):
    """Make training a matter of seconds: a tiny model, short chains."""

    def config(tokenizer):
        return LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    monkeypatch.setattr(training, "reasoner_config", config)
    monkeypatch.setattr(training, "CURRICULUM", (((4, 5), (40, 60)), ((4, 6), (60, 90))))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_counts_chain_tokens_other_than_slips(family, monkeypatch):
    problems = []

    def recorded(*arguments, **settings):
        problems.append(make_problem(*arguments, **settings))
        return problems[-1]

    monkeypatch.setattr(training, "make_problem", recorded)
    monkeypatch.setattr(training, "SLIP_RATE", 0.5)
    tokenizer = build_tokenizer()
    ids, labels = training.make_batch(tokenizer, family, step=3, stage=0, tokens=2000)
    assert len(problems) == len(ids) == len(labels) > 3
    assert any(problem.slips for problem in problems)
    for row, label, problem in zip(ids.tolist(), labels.tolist(), problems, strict=True):
        prompt, chain = tokenizer(problem.prompt).input_ids, problem.completion.split()
        used = len(prompt) + len(chain) + 1
        assert row[: len(prompt)] == prompt
        assert tokenizer.convert_ids_to_tokens(row[len(prompt) : used]) == [*chain, "<eos>"]
        assert set(row[used:]) <= {tokenizer.pad_token_id}
        ignored = {*range(len(prompt)), *(len(prompt) + slip for slip in problem.slips)}
        ignored |= set(range(used, len(row)))
        expected = [-100 if i in ignored else token for i, token in enumerate(row)]
        assert label == expected


def test_batches_are_fixed_by_step_family_and_stage():
    tokenizer = build_tokenizer()
    asked = [("walk", 0, 0), ("walk", 1, 0), ("program", 0, 0), ("walk", 0, 1)]
    batches = [training.make_batch(tokenizer, *each, 600)[0] for each in asked]
    assert torch.equal(batches[0], training.make_batch(tokenizer, *asked[0], 600)[0])
    assert len({tuple(batch[0].tolist()) for batch in batches}) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_training")
def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = {"steps": 5, "tokens": 300, "peak": 1e-3, "checkpoint_every": 2}
    training.train(tmp_path / "whole", **options)

    make_batch = training.make_batch

    def killed_at_step_three(tokenizer, family, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return make_batch(tokenizer, family, step, *rest)

    monkeypatch.setattr(training, "make_batch", killed_at_step_three)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "parts", **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(training, "make_batch", make_batch)
    training.train(tmp_path / "parts", **options)

    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert parts["step"] == whole["step"] == 5
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    rows = (tmp_path / "parts" / "training.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [5]
    assert (tmp_path / "parts" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_training")
def test_loss_goes_down():
    run = training.Run(build_tokenizer(), "cpu")
    losses = []
    for _ in range(12):
        figures = run.advance(0.02, 900)
        losses.append([figures[f"{family}_loss"] for family in FAMILIES])
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first - 0.5


@pytest.mark.usefixtures("tiny_training")
def test_problems_grow_once_the_easy_ones_are_mastered(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MOVE_UP_AT", 0.9)
    run = training.Run(build_tokenizer(), "cpu")
    run._recent.extend([1.0] * 48)
    run.advance(1e-3, 200)
    assert run.stage == 0  # 49 steps are too few to tell
    run.save(tmp_path / "run.pt")
    again = training.Run(build_tokenizer(), "cpu")
    again.restore(tmp_path / "run.pt")
    for each in (run, again):
        each.advance(1e-3, 200)
        assert each.stage == 1
    for _ in range(2):
        run._recent.extend([1.0] * 49)
        run.advance(1e-3, 200)
        assert run.stage == 1  # there is none above


def test_learning_rate_warms_up_and_falls():
    rates = [training.learning_rate(step, 4000, 1.0) for step in (0, 99, 1000, 2000, 3000, 3999)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.02])
